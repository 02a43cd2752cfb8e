"""The example subjects that come with the lab (assets/subjects): pictures, captions, class word, licence."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.bases import ASSETS

FOLDER = ASSETS / "subjects"


@dataclass(frozen=True)
class Example:
    id: str
    name: str
    class_word: str
    pictures: tuple[Path, ...]
    captions: tuple[str, ...]
    licence: str


@functools.cache
def examples() -> dict[str, Example]:
    """Example subjects by id, in the order of their folders' names."""
    found = {}
    for path in sorted(FOLDER.glob("*/subject.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        found[path.parent.name] = _example(path.parent, card)
    return found


def _example(folder: Path, card: dict[str, Any]) -> Example:
    pictures = tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")))
    captions = []
    for picture in pictures:
        words = picture.with_suffix(".txt")
        captions.append(words.read_text(encoding="utf-8").strip() if words.is_file() else "")
    return Example(
        id=folder.name,
        name=card.get("name") or folder.name.replace("-", " "),
        class_word=card["class_word"],
        pictures=pictures,
        captions=tuple(captions),
        licence=card.get("licence", ""),
    )
