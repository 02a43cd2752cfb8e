"""A home for one test's queue, and waiting for what real processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab.jobs import processes, workers
from lab.runs import Run, Store

ME = "me"
PATIENCE = 45.0  # seconds: the machine may be busy


def wait(test: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := test():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s for {what}")


@pytest.fixture(name="home")
def queue_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LAB_EXTRA_TASKS", "tests.queue_task")
    monkeypatch.setenv("LAB_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("LAB_MIN_FREE_MB", "0")
    monkeypatch.delenv("LAB_BACKEND", raising=False)
    monkeypatch.setattr(workers, "AGAIN_SECONDS", 0.0)
    yield tmp_path
    for lock in tmp_path.glob("worker-*.lock"):
        if pid := processes.holder(lock):
            os.kill(pid, signal.SIGKILL)
            wait(lambda lock=lock: not processes.held(lock), "the worker's end")


@pytest.fixture(name="store")
def queue_store(home: Path) -> Store:
    return Store(home)


def submit(store: Store, owner: str = ME, **spec: Any) -> list[Run]:
    pictures = [Image.new("RGB", (20, 20), (10 * n, 0, 0)) for n in range(3)]
    return store.comparison(owner, store.submit(owner, "toy", spec, pictures)).runs


def ended(store: Store, run: Run, owner: str = ME) -> Run:
    return wait(lambda: (r := store.run(owner, run.id)).over and r, f"the end of {run.method}")


def at_step(store: Store, run: Run, step: int) -> Run:
    return wait(lambda: (r := store.run(ME, run.id)).state == "running" and r.step >= step and r, f"step {step}")


def drain(home: Path) -> None:
    """Be the worker, in a process of its own, until the queue is empty."""
    subprocess.run([sys.executable, "-m", "lab.jobs.worker", "--drain"], check=True, timeout=PATIENCE, cwd=workers.ROOT)


def child_pid(run: Run) -> int:
    return int((run.folder / "pid").read_text())


def worker_pid(home: Path) -> int:
    return wait(lambda: processes.holder(workers.lock_path(home, "local", "main")), "a worker")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
