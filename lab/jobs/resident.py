"""Attempts one after another in one process, with the base model that the last one loaded.

Where forking is not possible, on GPUs and on macOS, every run would start a process of its own, import everything and
read the base from the disk again: 10 to 20 seconds for SDXL, for each method of a comparison. Here one process, kept
by the worker, does the attempts itself. Between two of them it puts the base back as it was read and compares it bit
by bit (lab/bases/_kept.py), and this process as it was (fresh.py); where that is not certain, it replaces itself with
a new image of itself, whose id, pipes and waiting order are the same. An attempt that kills the process costs that
attempt alone: the worker starts another.

LAB_RESIDENT=1 and 0 turn it on and off; by default it is for GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import platform
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

from lab.jobs import Orders, child, processes
from lab.jobs.fresh import Fresh
from lab.jobs.kept import Kept, KeptAttempt, sees_gpu


class Resident(Kept):
    """The process that does the attempts."""

    module = "lab.jobs.resident"

    @staticmethod
    def possible(device: str) -> bool:
        wish = os.environ.get("LAB_RESIDENT", "").strip()
        if wish in ("0", "1"):
            return wish == "1"
        named = os.environ.get("LAB_DEVICE", "").strip()
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        return not named.startswith("cpu") if named else apple or sees_gpu(device)

    def begin(self, orders: Orders) -> KeptAttempt:
        return ResidentAttempt(self, orders)

    def close(self) -> None:
        super().close()
        processes.signal_group(self.process.pid, signal.SIGKILL)  # what an attempt had started


class ResidentAttempt(KeptAttempt):
    """SIGTERM stops the run, not the process; SIGKILL ends both."""

    sweeps = False


# -- the resident's own process --------------------------------------------------------------------------
def main() -> None:
    parent = int(os.environ["LAB_PARENT"])
    if not processes.die_with(parent):
        return
    processes.volunteer_for_oom()
    faulthandler.enable()  # a segmentation fault leaves its stack in the run's log
    from lab.runs import default_home

    home = default_home()
    orders, answers, worker_log = _own_pipes()
    for run_id in _lines(orders):
        child.import_for(home, run_id)
        before = Fresh()
        os.write(answers, f"start {os.getpid()}\n".encode())
        with _output_to(child.open_log(home, run_id), worker_log):
            code = _attempt(home, run_id, parent)
        os.write(answers, f"end {code}\n".encode())
        if before.limits_changed():
            os._exit(child.CRASHED)
        if why := _not_fresh(before, code):
            print(f"resident: a new process: {why}", file=sys.stderr, flush=True)
            _again(orders, answers)


def _not_fresh(before: Fresh, code: int) -> str:
    """Make this process what it was before the attempt; "" when it is, else why it is not."""
    if code == child.NO_MEMORY:
        return "memory ran out"
    try:
        return before.restore()
    except Exception as error:  # a GPU that went wrong tells it at the next call
        return f"{type(error).__name__}: {error}"


def _attempt(home: Path, run_id: str, parent: int) -> int:
    """In a frame of its own: nothing of it is held when it has ended."""
    _seal_bases()
    return child.attempt(home, run_id, parent)


def _seal_bases() -> None:
    """Have what a base is like written down when it is read, if this task's imports can read any."""
    if "torch" in sys.modules:
        from lab.bases import _kept

        _kept.sealing = True


def _own_pipes() -> tuple[int, int, int]:
    """Descriptors of orders, answers and the worker's log that no program started here inherits."""
    orders, answers, log = (os.dup(number) for number in (0, 1, 2))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.close(nothing)
    return orders, answers, log


def _lines(pipe: int) -> Iterator[str]:
    """Lines until the worker closes the pipe. It writes one and waits for the end: no line is read before its turn."""
    text = b""
    while part := os.read(pipe, 4096):
        *whole, text = (text + part).split(b"\n")
        yield from (line.decode() for line in whole)


@contextlib.contextmanager
def _output_to(log: int, after: int) -> Generator[None]:
    """Everything that is printed, by C libraries and programs too, goes into a run's log."""
    _print_to(log)
    os.close(log)
    try:
        yield
    finally:
        _print_to(after)


def _print_to(out: int) -> None:
    _flush()
    os.dup2(out, 1)
    os.dup2(out, 2)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def _again(orders: int, answers: int) -> NoReturn:
    """Become a new process, at the same end of the same pipes, without what was left running."""
    for pid in processes.members():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os.dup2(orders, 0)
    os.dup2(answers, 1)
    os.execv(sys.executable, [sys.executable, "-m", "lab.jobs.resident"])


if __name__ == "__main__":
    main()
