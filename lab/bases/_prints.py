"""Which weights a comparison is made with, written down beside its runs: a base that has changed since is told.

A print is cheap: of a safetensors file its header and a piece of every tensor, not the whole (seven gigabytes for SDXL,
several times a comparison). Sizes and headers alone do not do: weights that were trained on keep both. Training, or
merging an adapter, changes nearly every number of the tensors that it touches, so a piece of each tells.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lab import hub
from lab.errors import LabError
from lab.files import HEADER_BYTES, safetensors_table, write_json

if TYPE_CHECKING:
    from lab.bases import Base

FILE = "base.json"  # in a comparison's folder
PIECE = 1024  # bytes from the middle of each tensor


def hold(base: Base, folder: Path) -> None:
    """See that the base is what it was when the comparison in this folder began; its first run writes down what it is.

    Raises LabError, naming a file, when it is not. Files that came since are nothing to it: a download may go on.
    """
    now = prints(base)
    if not now:  # not on this machine: whoever loads it asks again
        return
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        write_json(folder / FILE, {"files": now})
        return
    changed = [file for file, value in before.items() if now.get(file) != value]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LabError(
            f"The base model {base.name} has changed since this comparison began ({changed[0]}{others}), and its runs "
            "would not be of one base: start a new comparison, or put the old files back."
        )


def prints(base: Base) -> dict[str, str]:
    """Sixteen digits a file: the weights and configurations that make the base, by their names in its folder. {} where it
    is not on this machine, or not as files of its own (open_clip's downloads)."""
    path = Path(base.source)
    if path.is_file():
        return {path.name: _print(path)}
    folder = path if path.is_dir() else hub.snapshot(base.source) if hub.is_id(base.source) else None
    if folder is None:
        return {}
    files = [file for depth in ("*", "*/*") for file in folder.glob(depth) if file.suffix in (".json", ".safetensors")]
    return {file.relative_to(folder).as_posix(): _print(file) for file in sorted(files) if file.is_file()}


def unet_digits(base: Base) -> str:
    """Eight digits of the hash of the whole UNet of a base in a local folder: what recorded scores are kept by."""
    weights = sorted((Path(base.source) / "unet").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:8]


def _print(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start, length in _pieces(file, size) if path.suffix == ".safetensors" else [(0, size)]:
            file.seek(start)
            found.update(file.read(length))
    return found.hexdigest()[:16]


def _pieces(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """(start, length) of what is read of a safetensors file; of a broken one, which loading will tell, the beginning."""
    try:
        header, table = safetensors_table(file)
        spans = [value["data_offsets"] for key, value in table.items() if key != "__metadata__"]
        pieces = [(8 + header + max(a, (a + b - PIECE) // 2), min(PIECE, b - a)) for a, b in sorted(spans)]
    except (ValueError, TypeError, KeyError):
        return [(0, min(size, HEADER_BYTES))]
    return [(0, 8 + header), *pieces]
