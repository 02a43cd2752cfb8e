"""Methods without an equation in `maps`, measured on their own code by a process that imports torch and then ends.

The page's process never imports torch for this: PEFT's half a gigabyte and seconds of importing would stay in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.coverage import curves
from lab.coverage.maps import MAPS
from lab.errors import LabError

SECONDS = 300
_one_at_a_time = threading.Lock()
_known: dict[str, list[dict[str, Any]]] = {}


def needed(id: str) -> bool:
    return id not in MAPS


def curve(id: str, d: int, counts: Sequence[int], *, seed: int = 0, target: str = "") -> list[dict[str, Any]]:
    """The records of `lab.coverage.curve`, with spectra. Raises LabError in the measuring process's own sentence."""
    numbers = ",".join(map(str, counts))
    arguments = [
        "coverage",
        "--d",
        str(d),
        "--method",
        id,
        "--params",
        numbers,
        "--seed",
        str(seed),
        "--json",
        "--spectra",
    ]
    if target:
        arguments += ["--target", target]
    key = " ".join(arguments)
    if all(curves.remembered(curves.Question(id, d, n, seed, target=target)) for n in counts):  # without torch
        return curves.curve(id, d, counts, seed=seed, target=target)
    with _one_at_a_time:
        if key not in _known:
            _known[key] = _run(arguments)
            while len(_known) > 256:
                _known.pop(next(iter(_known)))
        return _known[key]


def _run(arguments: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "lab", *arguments]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise LabError(f"Measuring took more than {SECONDS} s: take a smaller d or fewer parameter counts.") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith("lab coverage: ")]
        raise LabError(lines[-1].removeprefix("lab coverage: ") if lines else "The measuring process failed.")
    return json.loads(done.stdout)
