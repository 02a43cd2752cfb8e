"""A task that costs nothing and misbehaves on demand, for the tests of the queue. Registered in a training process by
LAB_EXTRA_TASKS=tests.queue_task.

It counts instead of training: `value` after n steps depends on every step before, as an adapter does, so a resumed
run that equals an uninterrupted one has lost nothing.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.tasks import TASKS, PlannedRun

DEFAULTS = {"class_word": "fox", "methods": {"lora": {}}, "seeds": [0], "steps": 6, "seconds": 0.0, "every": 2}


def expected(seed: int, steps: int) -> int:
    value = seed
    for step in range(steps):
        value = (value * 31 + step + 1) % 1_000_003
    return value


class Toy:
    id = "toy"
    name = "Counting"

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        spec = DEFAULTS | spec
        if not 0 < spec["steps"] <= 100_000:
            raise LabError(f"steps must be between 1 and 100000, got {spec['steps']}.")
        return spec

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        methods = [(name, seed) for name in spec["methods"] for seed in spec["seeds"]]
        return [PlannedRun("base", 0)] + [PlannedRun(name, seed, spec["methods"][name]) for name, seed in methods]

    def run(self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Any) -> dict[str, Any]:
        if planned.method == "base":
            return {"value": 0, "pictures": len(list(inputs.iterdir()))}
        saved = folder / "checkpoint.json"
        start, value = json.loads(saved.read_text()) if saved.exists() else (0, planned.seed)
        with (folder / "metrics.jsonl").open("a") as metrics:
            for step in range(start, spec["steps"]):
                value = (value * 31 + step + 1) % 1_000_003
                print(json.dumps({"step": step, "loss": 1 / (step + 1)}), file=metrics, flush=True)
                if (step + 1) % spec["every"] == 0:
                    temporary = folder / "checkpoint.tmp"
                    temporary.write_text(json.dumps([step + 1, value]))
                    temporary.replace(saved)
                misbehave(planned.knobs, step, folder)
                report(step + 1, spec["steps"], phase="training", loss=1.0)
                time.sleep(spec["seconds"])
        return {"value": value, "began_at": start, "nan": float("nan")}


def misbehave(knobs: dict[str, Any], step: int, folder: Path) -> None:
    """Do what the knob `do` says from step `at` on, every time or (`once`) in the first attempt only."""
    before = folder / "misbehaved"
    if step < knobs.get("at", 3) or (knobs.get("once") and before.exists()):
        return
    before.touch()
    match knobs.get("do"):
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "error":
            raise RuntimeError("the frobnicator\nis loose")
        case "refuse":
            raise LabError("The pictures are all of the same wall: send others.")
        case "full":  # the kernel's own ENOSPC
            with Path("/dev/full").open("w") as file:
                file.write("x" * 100_000)
        case "limit":  # nothing can be written from here on, not even outcome.json
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            (folder / "adapter.bin").write_bytes(b"x")
        case "leave":  # a program that goes on when the run is over
            (folder / "helper").write_text(str(subprocess.Popen(["sleep", "300"]).pid))
            return
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            helper = subprocess.Popen(["sleep", "300"])
            (folder / "helper").write_text(str(helper.pid))
            time.sleep(300)
    if "do" in knobs:
        raise OSError(errno.EINVAL, f"'{knobs['do']}' did not do what it says")


TASKS.register(Toy())
