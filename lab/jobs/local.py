"""The queue on this machine: one worker for each GPU, or one for the processor; one process group an attempt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.errors import LabError
from lab.jobs import Attempt, Orders, processes, register
from lab.jobs.kept import Kept
from lab.jobs.resident import Resident
from lab.jobs.warm import Nursery

ROOT = Path(__file__).resolve().parents[2]


class LocalAttempt:
    """A child of this process, the leader of its own process group."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            processes.signal_group(self._process.pid, signal.SIGKILL)  # what it started and left behind
        return code

    def stop(self) -> None:
        if self._process.poll() is None:
            processes.signal_group(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self._process.poll() is None:
            processes.signal_group(self._process.pid, signal.SIGKILL)


class Local:
    id = "local"
    name = "This machine"
    detached = False
    order = 0

    def __init__(self) -> None:
        self._kept: Kept | None = None

    def devices(self) -> Sequence[str]:
        """NVIDIA GPUs by their index, as CUDA_VISIBLE_DEVICES limits them; "main" where there is none."""
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        if given is not None:
            return [d for d in (part.strip() for part in given.split(",")) if d and d != "-1"] or ["main"]
        # Counted without torch: loading it takes seconds, and initialising CUDA takes memory on every GPU.
        gpus = Path("/proc/driver/nvidia/gpus")
        return [str(i) for i in range(len(list(gpus.iterdir())))] or ["main"] if gpus.is_dir() else ["main"]

    def slots(self) -> int:
        return 1

    def check(self) -> None:
        try:
            import fcntl  # noqa: F401 - POSIX only
        except ImportError:
            raise LabError("The queue needs Linux or macOS: on Windows run the lab under WSL or Docker.") from None

    def start(self, orders: Orders) -> Attempt:
        """A child of ours, or the next attempt of a process that has imported what it needs."""
        for kind in (Resident, Nursery):
            if kind.possible(orders.device):
                return self._begun(kind, orders)
        environment = os.environ | {
            "LAB_HOME": str(orders.home),
            "LAB_PARENT": str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        if orders.device != "main":
            environment["CUDA_VISIBLE_DEVICES"] = orders.device
        with (orders.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lab.jobs.child", orders.run_id],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalAttempt(process)

    def _begun(self, kind: type[Kept], orders: Orders) -> Attempt:
        kept = self._kept
        if isinstance(kept, kind) and kept.fit(orders.home, orders.device):
            with contextlib.suppress(BrokenPipeError):  # it died this moment
                return kept.begin(orders)
        self.rest()
        self._kept = kind(orders.home, orders.device)
        return self._kept.begin(orders)

    def find(self, orders: Orders) -> Attempt | None:
        """Always None: here an attempt ends with its worker. What should still be there is killed first."""
        try:
            pid = int((orders.folder / "pid").read_text())
        except (OSError, ValueError):
            return None
        if orders.run_id in processes.command_line(pid):  # else the number belongs to something else by now
            processes.signal_group(pid, signal.SIGKILL)
        return None

    def rest(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


register(Local())
