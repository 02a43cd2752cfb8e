"""Which models the few-shot task takes. No torch here."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lab.bases import BASES, Base
from lab.errors import LabError
from lab.registry import unknown

FAMILY = "open_clip"
_NAME = re.compile(r"(timm:)?[A-Za-z0-9_.-]+(:[\w./-]+)?|hf-hub:[\w.-]+/[\w.-]+")


def rows() -> list[Base]:
    """The registered models."""
    return BASES.where(lambda base: base.family == FAMILY)


def resolve(name: str, *, local: bool = True) -> Base:
    """The model with this id, or a row made for "NAME:TAG", "timm:NAME", "hf-hub:OWNER/NAME" or a folder.

    `local=False` (requests from a page) takes no folders and no files. Raises LabError for anything else.
    """
    if name in BASES:
        if BASES[name].family != FAMILY:
            raise LabError(f"'{name}' makes pictures: few-shot tuning needs one of {', '.join(b.id for b in rows())}.")
        return BASES[name]
    folder = Path(name).expanduser()
    if local and folder.is_dir():
        if not (folder / "open_clip_config.json").exists():
            raise LabError(f"'{name}' is not an open_clip folder: it holds no open_clip_config.json.")
        return _like(name, str(folder.resolve()))
    if not _NAME.fullmatch(name) or ":" not in name or (not local and ("/" in name or ".." in name)):
        raise unknown("model", name, [b.id for b in rows()])
    return _like(name, name)


def _like(name: str, source: str) -> Base:
    image_only = source.startswith("timm:")
    return dataclasses.replace(
        BASES["ViT-B-16:openai"],
        id=name,
        name=Path(name).name,
        source=source,
        architecture=name,
        targets="q,v" if image_only else "q,k,v",
        presets={"fewshot": {"preset": "nola" if image_only else "clip-lora"}},
        summary="",
        licence="",
    )


def has_text(base: Base) -> bool:
    """Whether the model has a text tower, without loading it."""
    return not base.source.startswith("timm:")
