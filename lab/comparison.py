"""A comparison in a folder, done here and now in this process: what the command line and the demo do.

The folder's layout is the queue's: spec.json, inputs/000.png …, runs/<method>-s<seed>/ with result.json, then
grid.png, results.csv, report.html. Calling again with the same folder goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lab import columns
from lab.errors import LabError
from lab.files import write_atomic, write_json
from lab.images import read_folder
from lab.tasks import TASKS, PlannedRun, Report


def run_name(planned: PlannedRun) -> str:
    return f"{planned.method}-s{planned.seed}"


def start(
    out: Path,
    task_id: str,
    spec: dict[str, Any],
    pictures: Sequence[Image.Image],
    adapters: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Write spec and inputs, and the adapters that stand beside the methods; the checked spec. Raises LabError when the
    folder holds another comparison."""
    spec = TASKS[task_id].check(spec | {"pictures": len(pictures)})
    before = out / "spec.json"
    if before.exists():
        if json.loads(before.read_text()) != json.loads(json.dumps(spec)):
            raise LabError(f"{out} holds a comparison with other settings: choose another folder, or remove it.")
        if not _same(pictures, read_folder(out / "inputs")):
            raise LabError(f"{out} holds a comparison of other pictures: choose another folder, or remove it.")
        if base := getattr(TASKS[task_id], "base", None):  # done runs are not begun again: nobody else would ask
            base(spec).hold(out)
        return spec
    if out.exists() and any(out.iterdir()):
        raise LabError(f"{out} is not empty: choose another folder.")
    columns.keep(adapters or {}, out / "inputs")
    for number, picture in enumerate(pictures):
        path = out / "inputs" / f"{number:03d}.png"
        write_atomic(path, lambda aside, picture=picture: picture.convert("RGB").save(aside, format="PNG"))
    write_json(before, spec)  # last: a folder with a spec is whole
    return spec


def _same(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> bool:
    pairs = zip(some, others, strict=True)
    return len(some) == len(others) and all(a.convert("RGB").tobytes() == b.tobytes() for a, b in pairs)


def run_all(out: Path, task_id: str, spec: dict[str, Any], report_for: Any, processes: int = 1) -> list[dict[str, Any]]:
    """Do every run that is not done. `report_for(planned)` gives the run's `report`.

    processes: how many runs are done at once, each in a process of its own with its share of the cores; `report_for`
    is then a function of a module. A run that fails with a LabError is "failed", with the sentence as its message; the
    others go on. Returns the runs as `lab.compare` takes them.
    """
    plan, runs = TASKS[task_id].plan(spec), []
    for planned, (state, message) in zip(plan, _attempts(out, task_id, spec, plan, report_for, processes), strict=True):
        folder = out / "runs" / run_name(planned)
        result = json.loads((folder / "result.json").read_text()) if state == "done" else {}
        runs.append(
            {
                "method": planned.method,
                "seed": planned.seed,
                "knobs": planned.knobs,
                "state": state,
                "message": message,
                "folder": str(folder),
                "result": result,
            }
        )
    return runs


def _attempts(
    out: Path, task_id: str, spec: dict[str, Any], plan: Sequence[PlannedRun], report_for: Any, processes: int
) -> Iterator[tuple[str, str]]:
    """(state, message) of each run, in the plan's order."""
    if processes <= 1:
        yield from (_attempt(out, task_id, spec, planned, report_for) for planned in plan)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), _share_cores, (processes,))
    try:
        yield from [
            waited.result()
            for waited in [pool.submit(_attempt, out, task_id, spec, planned, report_for) for planned in plan]
        ]
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(out: Path, task_id: str, spec: dict[str, Any], planned: PlannedRun, report_for: Any) -> tuple[str, str]:
    folder = out / "runs" / run_name(planned)
    report: Report = report_for(planned)
    if not (folder / "result.json").exists():
        try:
            write_json(folder / "result.json", TASKS[task_id].run(spec, planned, out / "inputs", folder, report))
        except LabError as error:
            return "failed", str(error)
    return "done", ""


def _share_cores(processes: int) -> None:
    """A process gets its share of the cores: torch, which is not imported yet, reads this when it is."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(threads) if threads.isdecimal() else len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))
