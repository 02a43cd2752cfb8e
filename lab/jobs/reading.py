"""Reads what a run writes while it writes it: logs, metrics, small JSON files. Every read is bounded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

TAIL_BYTES = 64 * 1024
WHOLE_BYTES = 2 * 1024 * 1024  # a longer metrics file is sampled, not read
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
_ROOT = Path(__file__).resolve().parents[2]


def json_file(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As `lab.files.write_json`, but not flushed to the disk: several times a second, for what a power cut may take."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def tail(path: Path, lines: int, hide: Path) -> str:
    """The file's last lines as a terminal would show them: of a progress bar, its last state.

    `hide` (the lab's home) and the folder of the lab's code do not appear in it: strangers read this.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    for folder, name in ((hide, "$LAB_HOME"), (_ROOT, ".")):
        text = text.replace(str(folder), name)
    shown = [_ESCAPES.sub("", line.rstrip("\r").rsplit("\r", 1)[-1]).rstrip() for line in text.split("\n")]
    shown = [line[:1000] for line in shown if line]
    return "\n".join(shown[-max(1, min(lines, 1000)) :])


def metrics(path: Path, points: int) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, in the order of their steps.

    A torn line (the writer is in the middle of it, or was killed there) is left out; of a step that was done twice
    (after a resume) the later record counts. First and last record are always among the chosen.
    """
    points = max(2, min(points, 5000))
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            lines = _sample(file, size, points) if size > WHOLE_BYTES else _every(file.read().split(b"\n"), points)
    except OSError:
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN: a gap in the curve
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _every(lines: list[bytes], points: int) -> list[bytes]:
    """About `points` of the lines, evenly spread, the first and the last two (the last may be torn) among them."""
    lines = [line for line in lines if line.strip()]
    if len(lines) <= points:
        return lines
    chosen = sorted({round(i * (len(lines) - 1) / (points - 1)) for i in range(points)} | {len(lines) - 2})
    return [lines[i] for i in chosen]


def _sample(file: Any, size: int, points: int) -> list[bytes]:
    """One line at each of `points` places of a long file, and those at its end."""
    found = [file.readline()]
    for i in range(1, points):
        file.seek(i * size // points)
        file.readline()  # the rest of the line this fell into
        found.append(file.readline())
    file.seek(max(0, size - 4096))
    return [*found, *file.read().split(b"\n")[1:]]
