"""Measured points on the disk, by what they are points of: a link shows the same numbers at once, after a restart too.

A point's name is a hash of its question and of the code that answers it, so nothing stale is ever read. It holds nothing
of whoever asked. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lab.coverage.maps import MAPS
from lab.errors import LabError
from lab.files import write_atomic

MOST = 4096  # files, of 10 KB or so each
EVERY = 64  # writes of a process between two sweeps
_written = 0


def path(question: str, id: str) -> Path:
    from lab.runs import default_home

    name = hashlib.sha256(f"{_code(id not in MAPS)} {question}".encode()).hexdigest()
    return default_home() / "coverage" / f"{name}.json"


def read(question: str, id: str) -> dict[str, Any] | None:
    """The point, or None when it is not there (or cannot be read)."""
    try:
        found = json.loads(path(question, id).read_text(encoding="utf-8"))
    except (OSError, ValueError, LabError):
        return None
    return found if isinstance(found, dict) else None


def write(question: str, id: str, record: dict[str, Any]) -> None:
    """Keep the point; a disk that is full or may not be written to keeps none."""
    global _written
    with contextlib.suppress(OSError, LabError):
        to = path(question, id)
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
def _code(own: bool) -> str:
    """A hash of the equations and measures, and where a method's own code is measured, of that code's."""
    root = Path(__file__).resolve().parent
    seen = hashlib.sha256()
    for file in _sources(root, own):
        seen.update(file.read_bytes())
    for package in ("numpy", "torch", "peft") if own else ("numpy",):
        with contextlib.suppress(metadata.PackageNotFoundError):
            seen.update(metadata.version(package).encode())
    return seen.hexdigest()


def _sources(root: Path, own: bool) -> Iterator[Path]:
    yield from sorted(root.glob("*.py"))
    yield root.parent / "budget.py"  # settings for a number of parameters
    yield from sorted((root.parent / "methods").glob("*.py")) if own else ()
