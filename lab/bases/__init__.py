"""Base models. ADD A BASE: one file in this folder that registers a row.

    from lab.bases import Base, register
    register(Base(id="my-base", name="My base", family="sdxl", source="owner/name", architecture="sdxl"))

Rows import no torch. `Base.load` hands the row to `lab/bases/_<family>.py`, which does. A base needs no row to be
used: `resolve` also takes a diffusers folder, a single `.safetensors` file, or a Hub id.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab.errors import LabError
from lab.registry import Registry, unknown

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class Base:
    """One base model.

    source: a Hub id, a diffusers folder, or a single `.safetensors` checkpoint
    variant: weight variant on the Hub ("fp16"); vae: Hub id or folder of a VAE to use in place of its own
    scorer: image-text model that scores its pictures: a folder of open_clip files, or "<open_clip name>:<weights>"
    size_conditioning: the base was trained with each picture's own size and crop (SDXL, section 2.2). Where it is
        not, every picture is told as an uncropped one of the base's own resolution.
    presets: task id → settings that replace the task's defaults; "learning_rates" and "knobs" by method id
    """

    id: str
    name: str
    family: Literal["sdxl", "open_clip"]
    source: str
    architecture: str
    summary: str = ""
    targets: str = "attn"
    scorer: str = "ViT-L-14:openai"
    variant: str | None = None
    vae: str | None = None
    size_conditioning: bool = True
    pixels: int | None = None  # resolution where the source cannot be read without loading it
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    licence: str = ""
    order: int = 100

    @functools.cached_property
    def resolution(self) -> int:
        """Side of the pictures it makes, in pixels."""
        if self.pixels:
            return self.pixels
        unet, vae = (_config(Path(self.source) / part / "config.json") for part in ("unet", "vae"))
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)

    @property
    def public_name(self) -> str:
        """What an adapter's file says it was trained on: the Hub id, or the folder's or file's name without its path."""
        return self.source if _HUB_ID.fullmatch(self.source) else Path(self.source).stem

    def preset(self, task: str) -> dict[str, Any]:
        return self.presets.get(task, {})

    def load(self, device: Any = None, dtype: Any = None) -> Any:
        """The model, e.g. a StableDiffusionXLPipeline, on `device` (default: the lab's) with weights in `dtype`.

        Raises LabError, in one sentence, when it is missing, gated, unreachable, or not safetensors.
        """
        return self._loader().load(self, device, dtype)

    def forget(self) -> None:
        """Let go of a loaded model, so that the next `load` reads it again."""
        self._loader().forget()

    def _loader(self) -> Any:
        return importlib.import_module(f"lab.bases._{self.family}")


def _config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LabError(
            f"{path.parent.parent} is not a whole diffusers folder: {path.parent.name}/{path.name} "
            "is missing or unreadable."
        ) from error


BASES: Registry[Base] = Registry("base model", "lab.bases")
register = BASES.register

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def resolve(name: str) -> Base:
    """The base with this id, or a row made for a folder, a `.safetensors` file, or a Hub id ("owner/name").

    Raises LabError for anything else; a pickled checkpoint is refused, because loading one runs the code in it.
    """
    if name in BASES:
        return BASES[name]
    if name.lower().endswith(_PICKLES):
        raise LabError(
            f"'{name}' is a pickled checkpoint, which can run any code when it is opened: "
            "convert it to .safetensors first."
        )
    path = Path(name).expanduser().resolve()
    like = BASES["sdxl"]
    if name and path.is_dir():
        if not (path / "model_index.json").exists():
            raise LabError(f"'{name}' is not a diffusers folder: it holds no model_index.json.")
        own = {"name": path.name, "vae": None, "pixels": None, "architecture": str(path / "unet" / "config.json")}
        summary = "A local diffusers folder."
        return dataclasses.replace(like, id=str(path), source=str(path), variant=None, summary=summary, **own)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise LabError(f"There is no file '{name}'.")
        summary = "A local single-file checkpoint."
        return dataclasses.replace(like, id=str(path), name=path.stem, source=str(path), variant=None, summary=summary)
    if _HUB_ID.fullmatch(name) and not name.startswith(("./", "../")):
        for row in BASES.where(lambda row: row.source == name):
            return row
        own = {"name": name.split("/")[1], "vae": None, "variant": None}
        return dataclasses.replace(like, id=name, source=name, summary="From the Hugging Face Hub.", **own)
    raise unknown("base model", name, BASES.ids())


__all__ = ["ASSETS", "BASES", "Base", "register", "resolve"]
