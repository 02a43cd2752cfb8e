"""Starting and finding the workers from any other process: the page, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lab.jobs import Backend, processes

ROOT = Path(__file__).resolve().parents[2]
AGAIN_SECONDS = 5.0  # a worker that ends at once is not started more often than this
LOG_BYTES = 2 * 2**20

_started: dict[Path, tuple[subprocess.Popen[bytes], float]] = {}
_lock = threading.Lock()


def lock_path(home: Path, backend_id: str, device: str) -> Path:
    return home / f"worker-{name(backend_id, device)}.lock"


def name(backend_id: str, device: str) -> str:
    """A worker's name, unique under one home: also what the table's `worker` column holds."""
    return f"{backend_id}-{device}"


def ensure(home: Path, backend: Backend) -> int:
    """Start the backend's workers that do not run; how many were started."""
    home = Path(home).resolve()
    missing = [d for d in backend.devices() if not processes.held(lock_path(home, backend.id, d))]
    if not missing:
        return 0
    backend.check()
    with _lock:
        return sum(_start(home, backend, device) for device in missing)


def _start(home: Path, backend: Backend, device: str) -> int:
    path = lock_path(home, backend.id, device)
    if path in _started:
        process, since = _started[path]
        if process.poll() is None or time.monotonic() - since < AGAIN_SECONDS:
            return 0  # on its way to the lock, or failing again and again: its log says why
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = path.with_suffix(".log")
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    command = [sys.executable, "-m", "lab.jobs.worker", "--device", device]
    # Threads that sleep while they wait: spinning ones bring training to a halt where other work shares the cores.
    quiet = {"OMP_WAIT_POLICY": "PASSIVE"}
    environment = quiet | os.environ | {"LAB_HOME": str(home), "LAB_BACKEND": backend.id, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # closing the page or its terminal does not reach it
        )
    _started[path] = (process, time.monotonic())
    return 1


def status(home: Path, backend: Backend) -> list[dict[str, Any]]:
    """One row a device: {"device", "running": bool, "pid": int | None}."""
    paths = {device: lock_path(Path(home).resolve(), backend.id, device) for device in backend.devices()}
    return [{"device": d, "running": processes.held(p), "pid": processes.holder(p)} for d, p in paths.items()]
