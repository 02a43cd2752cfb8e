"""A zip from a stranger with one adapter in it: two members at most are written, under the lab's own names."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NoReturn

from lab.adapter_files._header import ASK, MAX_BYTES, PICKLES, name_of
from lab.errors import LabError

MAX_MEMBERS = 1000
MAX_CONFIG = 1 << 20
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BLOCK = 1 << 20


def unpack(path: Path, into: Path, given: str | None = None) -> Path:
    """Write the zip's adapter to the folder `into` and return the file, or the folder when it has a configuration.

    Raises LabError: no zip, encrypted, too many members, none or several adapters, pickles, more than it says or
    than 1 GiB.
    """
    called = name_of(path, given)
    _check_directory(path, called)
    try:
        with zipfile.ZipFile(path) as archive:
            weights, config = _choose(archive.infolist(), called)
            into.mkdir(parents=True, exist_ok=True)
            _write(archive, weights, into / WEIGHTS, MAX_BYTES, called)
            if config is not None:
                _write(archive, config, into / CONFIG, MAX_CONFIG, called)
                return into
            return into / WEIGHTS
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise LabError(
            f"{called} is no zip that can be read, or is damaged: pack the adapter's folder again."
        ) from None


def _check_directory(path: Path, called: str) -> None:
    """Hold the directory's size against the file before the zipfile module reads all of it into memory."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 66_000))
        tail = file.read(66_000)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise LabError(f"{called} is no zip that can be read, or is cut off: pack the adapter's folder again.")
    members, length = struct.unpack("<HI", tail[at + 10 : at + 16])
    if b"PK\x06\x06" in tail or members > MAX_MEMBERS or length > MAX_MEMBERS * 1024:
        raise LabError(f"{called} holds more than {MAX_MEMBERS} files: pack the adapter's folder alone.")


def _choose(members: list[zipfile.ZipInfo], called: str) -> tuple[zipfile.ZipInfo, zipfile.ZipInfo | None]:
    if len(members) > MAX_MEMBERS:
        raise LabError(f"{called} holds more than {MAX_MEMBERS} files: pack the adapter's folder alone.")
    names = {PurePosixPath(m.filename.replace("\\", "/")): m for m in members if not m.is_dir()}
    names = {p: m for p, m in names.items() if not any(part.startswith((".", "__MACOSX")) for part in p.parts)}
    configs = {p.parent: m for p, m in names.items() if p.name == CONFIG}
    found = [p for p in names if p.suffix.lower() == ".safetensors"]
    beside = [p for p in found if p.parent in configs and p.name == WEIGHTS]
    chosen = beside or found
    if not chosen:
        if any(p.name.lower().endswith(PICKLES) for p in names):
            raise LabError(
                f"{called} holds a pickle, which can run any code when it is opened, so it is not opened here: {ASK}."
            )
        raise LabError(f"{called} holds no .safetensors file: pack adapter_config.json and {WEIGHTS} into it.")
    if len(chosen) > 1:
        raise LabError(f"{called} holds {len(chosen)} adapters: pack one alone.")
    return names[chosen[0]], configs.get(chosen[0].parent)


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, to: Path, most: int, called: str) -> None:
    """At most `most` bytes, counted as they come: what a member claims decides nothing."""
    if member.flag_bits & 1:
        raise LabError(f"{called} is encrypted: pack it again without a password.")
    if member.file_size > most:
        _too_large(called, most)
    written = 0
    with archive.open(member) as source, to.open("wb") as target:
        while block := source.read(_BLOCK):
            written += len(block)
            if written > most:
                to.unlink()
                _too_large(called, most)
            target.write(block)


def _too_large(called: str, most: int) -> NoReturn:
    what = f"{most >> 30} GiB" if most >= 1 << 30 else f"{most >> 20} MiB"
    raise LabError(f"{called} unpacks to more than {what}: it is not unpacked.")
