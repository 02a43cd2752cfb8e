"""What the queue needs of the operating system: locks that die with their holder, children that die with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path


class Lock:
    """An exclusive lock on a file, let go by the system when the holder ends, however it ends. Not inherited by
    the programs it starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self, patience: float = 0.0) -> bool:
        """Try for `patience` seconds; whether it is ours now. Writes our process id into the file."""
        import fcntl

        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    return False
                time.sleep(0.05)
            else:
                break
        self._fd = fd
        with contextlib.suppress(OSError):  # a full disk: the number is only for people
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        return True

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def held(path: Path) -> bool:
    """Whether some process holds the lock on this file."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def holder(path: Path) -> int | None:
    """Process id of the lock's holder, None when nobody holds it."""
    try:
        return int(path.read_text()) if held(path) else None
    except (OSError, ValueError):
        return None


def die_with(parent: int) -> bool:
    """Have the system kill this process when `parent` ends (Linux); False when that has happened already.

    Elsewhere nothing but the check is done: poll `os.getppid()` as well.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def volunteer_for_oom() -> None:
    """When memory runs out, let the system choose this process, not the page or the user's other programs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("700")


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group that `pid` leads; nothing happens when it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def members() -> list[int]:
    """The other processes of this process's group: what it started and left running. Not Python's own, which sees to
    semaphores."""
    from multiprocessing import resource_tracker

    own, group = {os.getpid(), getattr(resource_tracker._resource_tracker, "_pid", None)}, os.getpgrp()
    found = _groups_by_proc() if sys.platform == "linux" else _groups_by_ps()
    return [pid for pid, its_group in found if its_group == group and pid not in own]


def _groups_by_proc() -> Iterator[tuple[int, int]]:
    """(process, its group) of all that live."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                yield int(path.parent.name), int(group)


def _groups_by_ps() -> Iterator[tuple[int, int]]:
    import subprocess

    with subprocess.Popen(["ps", "-A", "-o", "pid=,pgid="], stdout=subprocess.PIPE, text=True) as ps:
        lines = ps.communicate()[0].splitlines()
    for line in lines:
        pid, group = map(int, line.split())
        if pid != ps.pid:
            yield pid, group


def command_line(pid: int) -> str:
    """The command line of a process, "" when there is none (or no way to know)."""
    proc = Path(f"/proc/{pid}/cmdline")
    if proc.parent.parent.exists() and Path("/proc/self/cmdline").exists():
        with contextlib.suppress(OSError):
            return proc.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        return ""
    import subprocess

    try:
        done = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
