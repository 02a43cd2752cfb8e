"""Files that are either whole or not there, and what a safetensors file says of itself."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lab.errors import LabError

HEADER_BYTES = 100_000_000  # of a safetensors file: the format's own limit


def write_atomic(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write aside, flush to the disk, rename: a reader, or a crash, sees the old file or the new one.

    `content` is the bytes or text, or a function that writes the file it is given. Raises LabError when the disk
    is full; the old file stays as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabError(
                f"The disk is full: {path.name} could not be saved; free some space and try again."
            ) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """One JSON object, indented, atomically. Raises ValueError on NaN or infinity."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def safetensors_table(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """(length of the header in bytes, its entries) of an opened safetensors file that the lab was given by its owner; of a
    stranger's, `lab.adapter_files` says what is wrong with it. Raises ValueError or TypeError when it
    has no such header."""
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    return length, dict(json.loads(file.read(length)))
