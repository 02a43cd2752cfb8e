"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.errors import LabError


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
