"""What the lab says when there is no room left, and how it knows that this was the reason."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

# EFBIG: a limit on the size of one file (ulimit -f), which is no room either.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors, torch and SQLite say it in words, not with an errno.
PHRASES = ("no space left on device", "os error 28", "disk is full", "disk quota exceeded", "file too large")


def is_full(error: BaseException | None) -> bool:
    """Whether this error, or one it came from, means that a file could not be written for want of room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        if any(phrase in str(error).lower() for phrase in PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False


def sentence(folder: Path) -> str:
    """One sentence for people; names no path, because strangers may read it."""
    try:
        free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MB free)"
    except OSError:
        free = ""
    return (
        f"The disk is full{free}, so the run's files could not be saved: make room, for instance by deleting old "
        "comparisons, and press Retry; it goes on from its last checkpoint."
    )


def size(folder: Path) -> int:
    """Bytes of all files under a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
