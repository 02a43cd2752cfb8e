"""Measured points on the disk, by what they are points of: a link shows the same numbers at once, after a restart too.

A point's name is a hash of its question and of the code that answers it, so nothing stale is ever read. It holds nothing
of whoever asked. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from lab.coverage.fit import REAL
from lab.errors import LabError
from lab.files import write_atomic

MOST = 4096  # files, of 10 KB or so each
EVERY = 64  # writes of a process between two sweeps
_written = 0


def path(question: str) -> Path:
    from lab.runs import default_home

    name = hashlib.sha256(f"{_code()} {question}".encode()).hexdigest()
    return default_home() / "coverage" / f"{name}.json"


def read(question: str) -> dict[str, Any] | None:
    """The point, or None when it is not there (or cannot be read)."""
    try:
        found = json.loads(path(question).read_text(encoding="utf-8"))
    except (OSError, ValueError, LabError):
        return None
    return found if isinstance(found, dict) else None


def write(question: str, record: dict[str, Any]) -> None:
    """Keep the point; a disk that is full or may not be written to keeps none."""
    global _written
    with contextlib.suppress(OSError, LabError):
        to = path(question)
        if _written % EVERY == 0:
            sweep(to.parent)
        _written += 1
        write_atomic(to, json.dumps(record))


def sweep(folder: Path, most: int = MOST) -> None:
    """Remove the oldest files beyond `most`, and what a crash left behind."""
    found = []
    for file in folder.glob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another process sweeps too
            found.append((file.stat().st_mtime, file))
    for _, file in sorted(found, reverse=True)[most:]:
        file.unlink(missing_ok=True)


@functools.cache
def _code() -> str:
    """A hash of all that a point depends on: measures, equations, the methods and what they and the settings for a number of
    parameters are made with, the real target. A few milliseconds, once a process."""
    lab = Path(__file__).resolve().parents[1]
    seen = hashlib.sha256()
    for pattern in ("coverage/*.py", "methods/*.py", "budget*.py", "counter.py", "svd.py"):
        for file in sorted(lab.glob(pattern)):
            seen.update(file.read_bytes())
    seen.update(REAL.read_bytes())
    for package in ("numpy", "torch", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            seen.update(f"{package} {metadata.version(package)}".encode())
    return seen.hexdigest()
