"""From a run's start to its first training step: each run in a process of its own, and one after another in a resident.

    python -m lab bench resident --write
    python -m lab bench resident --base sdxl    on a GPU

The runs go through the local queue backend, as a worker starts them. `--write` puts the table into lab/bench/sdxl.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from lab.bench import _tables

HELP = "seconds from a run's start to its first step, with and without the resident process"
TABLE = Path(__file__).parent / "sdxl.md"
MODES = {  # what each is called → the environment
    "a new process each": {"LAB_RESIDENT": "0", "LAB_WARM": "0"},
    "forked (the default without a GPU)": {"LAB_RESIDENT": "0", "LAB_WARM": "1"},
    "one resident": {"LAB_RESIDENT": "1"},
}

NOTE = (
    "Of forked runs the processor seconds are the child's own: what it was forked from imported everything before the "
    "first. The embedded base is read in 0.4 processor seconds, so nearly all that a resident saves here is imports; the "
    "10 to 20 seconds of reading SDXL are not in this table. On a CPU a resident's later runs begin with what libraries of "
    "earlier phases hold, and the peak is that much higher; on a GPU it counts tensors, and more than 64 MiB left by a run "
    "end the process."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="tiny-sdxl")
    parser.add_argument("--methods", default="lora,nora", help="names between commas, in the order they are done")
    parser.add_argument("--write", action="store_true", help="write the table into lab/bench/sdxl.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"device", "base", "runs": [{"mode", "run", "seconds", "cpu_seconds", "peak_bytes"}]}, in the order they were done.

    seconds: to the first training step, of the clock; cpu_seconds: of the process that trains, None where the system
    does not say; peak_bytes: of training, as the run's result tells it.
    """
    runs = []
    for mode, environment in MODES.items():
        with tempfile.TemporaryDirectory() as home, _environment(environment | {"LAB_HOME": home}):
            runs += [{"mode": mode} | row for row in _measured(Path(home), args)]
    from lab import device as devices  # here: the processes above are forked and started without torch

    made = {"device": devices.describe(devices.pick()), "base": args.base, "runs": runs}
    if args.write:
        _tables.write(TABLE, "resident", table(made))
    return made


def _measured(home: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    from lab.bench._pictures import discs
    from lab.jobs import kept
    from lab.jobs.local import Local
    from lab.runs import Store

    spec = {
        "base": args.base,
        "class_word": "fox",
        "methods": {id: {} for id in args.methods.split(",")},
        "seeds": [0],
        "batch": 1,
        "steps": 2,
        "prompts": ["a {subject} in the snow"],
        "unrelated_prompts": [],
        "sample_seeds": [0],
        "sampling_steps": 2,
        "preview_every": 0,
    }
    setattr(kept, "code_version", lambda: 0)  # noqa: B010 - an edit while it measures would end the resident
    store, local = Store(home), Local()
    store.submit("bench", "subject", spec, discs())
    found = []
    try:
        while (row := _next(home, local)) is not None:
            found.append(row)
    finally:
        local.rest()
    return found


def _next(home: Path, local: Any) -> dict[str, Any] | None:
    """Do the queue's next run as a worker would; None when there is none."""
    from lab.jobs.table import Table
    from lab.jobs.worker import Worker

    worker = Worker(home, local, local.devices()[0])
    worker.table = Table(home)
    row = worker.table.claim(worker.name)
    if row is not None and row["method"] == "base":  # it has no first step
        row = worker.table.claim(worker.name)
    if row is None:
        return None
    orders = worker._orders(row)
    worker._write_orders(row, orders)
    ready = local._kept
    before = _cpu(ready.process.pid) if ready else 0.0
    began, seconds, cpu = time.monotonic(), 0.0, None
    attempt = local.start(orders)
    metrics = orders.folder / "metrics.jsonl"
    while attempt.poll() is None:
        if not seconds and metrics.exists() and metrics.stat().st_size:
            seconds, after = time.monotonic() - began, _cpu(attempt.pid or 0)
            same = ready is not None and attempt.pid == ready.process.pid
            cpu = None if after is None or before is None else after - (before if same else 0.0)
        time.sleep(0.01)
    result = json.loads((orders.folder / "result.json").read_text(encoding="utf-8"))
    peak = result.get("peak_memory_bytes")
    return {"run": orders.folder.name, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def _cpu(pid: int) -> float | None:
    """Processor seconds that a process has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Generator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- output --------------------------------------------------------------------------------------------
def table(made: dict[str, Any]) -> str:
    lines = [
        "## From a run's start to its first step",
        "",
        f"`python -m lab bench resident --write`: {made['base']}, batch 1; {made['device']}. Importing, reading the base, "
        "encoding, attaching and the measured step before the first included. Peak: of training, of the whole process "
        "on a CPU.",
        "",
        "| runs | run | seconds | processor seconds | peak, MiB |",
        "|-|-|-:|-:|-:|",
    ]
    for row in made["runs"]:
        cpu = "–" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.1f}"
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(f"| {row['mode']} | {row['run']} | {row['seconds']:.1f} | {cpu} | {peak} |")
    lines += ["", NOTE]
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    print(table(result))
