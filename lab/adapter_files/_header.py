"""The header of a safetensors file from a stranger, checked before a tensor of it is touched.

The format (https://huggingface.co/docs/safetensors): 8 bytes N, little endian; N bytes of JSON, name → {dtype, shape,
data_offsets}; then the tensors, without holes. Everything that a header can claim is held against the file's size:
what is read afterwards is never larger than the file itself.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lab.errors import LabError

if TYPE_CHECKING:
    import torch

MAX_BYTES = 1 << 30
MAX_HEADER = 16 << 20  # 10,000 layers of three tensors take 6 MB; parsed, JSON takes about ten times its size
MAX_TENSORS = 40_000
MAX_SIDE = 1 << 24
MAX_NAME = 512
MAX_METADATA = 4 << 20
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ASK = "ask for, or convert it to, a .safetensors file"


@dataclass(frozen=True)
class Entry:
    """One tensor as the header tells it, already held against the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A checked file: what is in it, and tensors one at a time."""

    path: Path
    called: str  # how messages name it; never a path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    bytes: int

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor in float32. Raises LabError when it is not finite, or not of floating point."""
        import torch
        from safetensors import SafetensorError, safe_open

        if self.entries[key].dtype not in FLOATS:
            raise LabError(f"{self.called} holds whole numbers in {_short(key)}: quantised adapters cannot be read.")
        try:
            with safe_open(str(self.path), "pt") as file:
                value = file.get_tensor(key).float()
        except (SafetensorError, OSError, MemoryError) as error:
            raise LabError(f"{self.called} is damaged: {_short(key)} cannot be read ({error}).") from None
        if not bool(torch.isfinite(value).all()):
            raise LabError(
                f"{self.called} holds NaN or infinity in {_short(key)}: its training has diverged; there is nothing to see."
            )
        return value


def name_of(path: Path, given: str | None = None) -> str:
    """A file's name in a sentence: quoted, one line, short, never a path."""
    text = "".join(c if c.isprintable() else " " for c in (given or path.name))
    return f"'{text if len(text) <= 60 else text[:57] + '…'}'"


def refuse_pickle(name: str, called: str) -> None:
    """Raise LabError for the file names that pickles have."""
    if name.lower().endswith(PICKLES):
        raise LabError(
            f"{called} is a pickle, which can run any code when it is opened, so it is not opened here: {ASK}."
        )


def opened(path: Path, given: str | None = None) -> TensorFile:
    """Check a file's header and return what it holds. `given`: how messages call it (default: its own name).

    Raises LabError, one sentence, for whatever is wrong; reads no more than MAX_HEADER bytes.
    """
    called = name_of(path, given)
    refuse_pickle(given or path.name, called)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            _look(head, called)
            length = int.from_bytes(head[:8], "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8) or size > MAX_BYTES:
                _bad_length(called, length, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise LabError(f"{called} cannot be read: {error.strerror or 'it is not there'}.") from None
    entries, metadata = _parse(raw, called)
    _check_offsets(entries, size - 8 - length, called)
    return TensorFile(path, called, {k: e for k, (e, _) in entries.items()}, metadata, size)


def _look(head: bytes, called: str) -> None:
    """Refuse what is not safetensors by its first bytes."""
    if len(head) < 10:
        raise LabError(f"{called} is empty or cut off ({len(head)} bytes): send it again.")
    torch_zip = head[:4] == b"PK\x03\x04" and (b"data.pkl" in head or b"/byteorder" in head or b"/version" in head)
    if torch_zip or (head[0] == 0x80 and head[1] in range(2, 6)) or head[:10] == b"PYTORCH_OR":
        raise LabError(
            f"{called} is a pickle under another name, which can run any code when it is opened, so it is not opened "
            f"here: {ASK}."
        )
    if head[:4] == b"PK\x03\x04":
        raise LabError(f"{called} is a zip under another name: call it .zip, or send the .safetensors file in it.")
    if head.lstrip()[:1] == b"<" or head.startswith(b"version https://git-lfs"):
        raise LabError(f"{called} is a web page or a pointer in place of the file: download the file itself.")


def _bad_length(called: str, length: int, size: int) -> NoReturn:
    if size > MAX_BYTES:
        raise LabError(f"{called} has {size / 2**30:.1f} GiB: at most {MAX_BYTES >> 30} GiB is read.")
    if length > size - 8:
        raise LabError(
            f"{called} is no safetensors file, or is cut off: its header claims {length:,} bytes, the file has {size:,}."
        )
    raise LabError(
        f"{called} has a header of {length:,} bytes: at most {MAX_HEADER >> 20} MiB is read, an adapter's has less."
    )


def _parse(raw: bytes, called: str) -> tuple[dict[str, tuple[Entry, tuple[int, int]]], dict[str, str]]:
    """Entries with their offsets, and the metadata."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [k for k, _ in pairs]
            twice = next(k for k in found if names.count(k) > 1) if len(names) < 100 else "a name"
            raise LabError(f"{called} has a lying header: it names {_short(twice)} twice.")
        return found

    if _too_deep(raw):
        raise LabError(f"{called} has a header that no safetensors file has: it is nested too deep.")
    try:
        table = json.loads(raw, object_pairs_hook=unique, parse_int=_int)
    except (ValueError, RecursionError):
        raise LabError(f"{called} is no safetensors file: its header is not JSON.") from None
    if not isinstance(table, dict):
        raise LabError(f"{called} is no safetensors file: its header is no table of tensors.")
    metadata = _metadata(table.pop("__metadata__", None) or {}, called)
    if not table:
        raise LabError(f"{called} holds no tensors.")
    if len(table) > MAX_TENSORS:
        raise LabError(f"{called} holds {len(table):,} tensors: at most {MAX_TENSORS:,} are read, no adapter has more.")
    return {key: _entry(key, value, called) for key, value in table.items()}, metadata


def _int(text: str) -> int:
    """Python's own conversion of a number of a million digits takes minutes."""
    return int(text) if len(text) <= 20 else -1


def _too_deep(raw: bytes, limit: int = 8) -> bool:
    """Whether brackets are nested deeper than `limit`, told before a parser recurses into them."""
    brackets = re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}]', b"", raw)
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > limit:
            return True
    return False


def _metadata(given: Any, called: str) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise LabError(f"{called} has a header whose metadata are no texts: it is damaged.")
    return {k[:MAX_NAME]: v for k, v in given.items() if len(v) <= MAX_METADATA}


def _entry(key: str, value: Any, called: str) -> tuple[Entry, tuple[int, int]]:
    if len(key) > MAX_NAME:
        raise LabError(f"{called} has a lying header: a tensor's name has {len(key):,} characters.")
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(type(x) is int and x >= 0 for x in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        raise LabError(f"{called} has a header that does not say type, shape and place of {_short(key)}.") from None
    if dtype not in BYTES:
        raise LabError(f"{called} holds {_short(key)} as {str(dtype)[:20]}, a type that cannot be read.")
    if not whole or len(shape) > 6 or any(x > MAX_SIDE for x in shape):
        raise LabError(f"{called} has a lying header: {_short(key)} has the shape {_shape(shape)}.")
    entry = Entry(dtype, tuple(shape), end - start)
    if entry.bytes != entry.numel * BYTES[dtype]:
        raise LabError(
            f"{called} has a lying header: {_short(key)} of shape {_shape(shape)} needs {entry.numel * BYTES[dtype]:,} "
            f"bytes and claims {entry.bytes:,}."
        )
    return entry, (start, end)


def _check_offsets(entries: dict[str, tuple[Entry, tuple[int, int]]], room: int, called: str) -> None:
    """Tensors lie one after the other, from the header to the end of the file."""
    at, before = 0, ""
    for key, (_, (start, end)) in sorted(entries.items(), key=lambda item: item[1][1]):
        if end > room:
            raise LabError(
                f"{called} is cut off, or its header lies: {_short(key)} ends at byte {end:,} of {room:,} that are there."
            )
        if start < at:
            raise LabError(f"{called} has a lying header: {_short(key)} overlaps {_short(before)}.")
        if start > at:
            raise LabError(
                f"{called} has a lying header: {start - at:,} bytes before {_short(key)} belong to no tensor."
            )
        at, before = end, key
    if at != room:
        raise LabError(f"{called} has a lying header: {room - at:,} bytes at its end belong to no tensor.")


def _short(key: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in key)
    return text if len(text) <= 90 else text[:87] + "…"


def _shape(shape: Any) -> str:
    return " × ".join(str(x)[:14] for x in list(shape)[:8]) if isinstance(shape, list) and shape else str(shape)[:40]


short, times = _short, _shape
