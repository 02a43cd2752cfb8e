"""Processes that a worker keeps for its next attempts: its side of them. `warm.py` and `resident.py` are theirs.

A line with a run's id on the process's standard input is an order; it answers "start PID" when the attempt is under
way and can be signalled, and "end CODE".
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from lab.jobs import Orders, processes

ROOT = Path(__file__).resolve().parents[2]
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under Windows


def sees_gpu(device: str) -> bool:
    """Whether a worker's device is, or may become, a GPU; told without torch, whose import takes seconds."""
    if device != "main":
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path(gpu).exists() for gpu in GPUS)


class Kept:
    """A kept process, and whether it is still of use."""

    module = ""  # what it runs

    def __init__(self, home: Path, device: str = "main") -> None:
        self.home, self.device, self.version = home, device, code_version()
        own = {"LAB_HOME": str(home), "LAB_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=ROOT,
            env=os.environ | own | ({} if device == "main" else {"CUDA_VISIBLE_DEVICES": device}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    @staticmethod
    def possible(device: str) -> bool:
        """Whether this worker's attempts are to be done so."""
        raise NotImplementedError

    def fit(self, home: Path, device: str = "main") -> bool:
        """False once it has ended, or the lab's code has changed since it was imported."""
        same = (self.home, self.device, self.version) == (home, device, code_version())
        return self.process.poll() is None and same

    def begin(self, orders: Orders) -> KeptAttempt:
        """Order an attempt. Raises BrokenPipeError when the process died this moment."""
        return KeptAttempt(self, orders)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.kill()
        self.process.wait()


class KeptAttempt:
    """An attempt that a kept process was told to do. One at a time."""

    sweeps = True  # whether the attempt's process group ends with it

    def __init__(self, kept: Kept, orders: Orders) -> None:
        self.pid: int | None = None
        self._process, self._text, self._code = kept.process, b"", None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._answers = self._process.stdout.fileno()
        os.set_blocking(self._answers, False)
        self._process.stdin.write(f"{orders.run_id}\n".encode())
        self._process.stdin.flush()

    def poll(self) -> int | None:
        self._listen()
        died = self._process.poll() is not None
        if self._code is None and died:
            self._listen()  # what it said last
            self._code = self._process.returncode or 137 if self._code is None else self._code
        if self._code is not None and self.pid and (self.sweeps or died):
            processes.signal_group(self.pid, signal.SIGKILL)  # what the attempt started and left behind
        return self._code

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is not None:
            return
        if self.pid:
            processes.signal_group(self.pid, number)
        else:
            self._process.kill()  # it is still importing: there is nothing else to stop

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self._answers, 4096)
        *lines, self._text = self._text.split(b"\n")
        for word, number in (line.split() for line in lines):
            if word == b"start":
                self.pid = int(number)
            else:
                self._code = int(number)


def code_version() -> int:
    """Changes when a file of the lab does: whoever adds a method need not restart the worker."""
    return max((path.stat().st_mtime_ns for path in (ROOT / "lab").rglob("*.py")), default=0)
