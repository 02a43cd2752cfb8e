"""Training processes that start at once.

Importing torch, diffusers and transformers costs several seconds of processor time, for every run anew. Here one
process, kept by the worker, imports what a task says it needs (`Task.imports`) and forks a child for each attempt.
It only imports: no tensor is made before the fork, no thread is started, so the child is as if it had imported
everything itself. On Linux without a GPU only: elsewhere system libraries do not survive a fork, and a run
on a GPU is long enough. LAB_WARM=0 turns it off.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from lab.jobs import Orders, child, processes

ROOT = Path(__file__).resolve().parents[2]


GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under Windows


def possible(device: str) -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    no_gpu = hidden or not any(Path(gpu).exists() for gpu in GPUS)
    return device == "main" and sys.platform == "linux" and no_gpu and os.environ.get("LAB_WARM", "1") != "0"


class Nursery:
    """The worker's side: the process that forks, and whether it is still of use."""

    def __init__(self, home: Path) -> None:
        self.home, self.version = home, _version()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.jobs.warm"],
            cwd=ROOT,
            env=os.environ | {"LAB_HOME": str(home), "LAB_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def fit(self, home: Path) -> bool:
        """False once it has ended, or the lab's code has changed since it was imported."""
        return self.process.poll() is None and self.home == home and self.version == _version()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.kill()
        self.process.wait()


class WarmAttempt:
    """An attempt that the nursery was told to start. One at a time."""

    def __init__(self, nursery: Nursery, orders: Orders) -> None:
        self.pid: int | None = None
        self._process, self._text, self._code = nursery.process, b"", None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._answers = self._process.stdout.fileno()
        os.set_blocking(self._answers, False)
        self._process.stdin.write(f"{orders.run_id}\n".encode())
        self._process.stdin.flush()

    def poll(self) -> int | None:
        self._listen()
        if self._code is None and self._process.poll() is not None:
            self._listen()  # what it said last
            self._code = self._process.returncode or 137 if self._code is None else self._code
        if self._code is not None and self.pid:
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


def _version() -> int:
    """Changes when a file of the lab does: whoever adds a method need not restart the worker."""
    return max((path.stat().st_mtime_ns for path in (ROOT / "lab").rglob("*.py")), default=0)


# -- the nursery's own process ---------------------------------------------------------------------------
def main() -> None:
    if not processes.die_with(int(os.environ["LAB_PARENT"])):
        return
    from lab.runs import default_home

    home = default_home()
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")  # the threads are OpenBLAS's own
    for line in sys.stdin:
        run_id = line.strip()
        _import_for(home, run_id)
        gc.freeze()  # what is here now stays shared with the children
        pid = os.fork()
        if pid == 0:
            _become(home, run_id)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here too: whoever is told of it may signal the group at once
        print("start", pid, flush=True)
        print("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _import_for(home: Path, run_id: str) -> None:
    try:
        child.import_extras()
        from lab.tasks import TASKS

        for module in getattr(TASKS[child.read_orders(home, run_id)["task"]], "imports", ()):
            importlib.import_module(module)
    except Exception as error:
        # Not for here to tell: the child meets it again, where it becomes the run's message.
        print(f"nursery: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _become(home: Path, run_id: str) -> NoReturn:
    """Be the training process: own group, own output, and the nursery for a parent."""
    code = child.FAILED
    try:
        os.environ["LAB_PARENT"] = str(os.getppid())
        os.setpgid(0, 0)
        log = os.open(
            home / child.read_orders(home, run_id)["folder"] / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT
        )
        nothing = os.open(os.devnull, os.O_RDONLY)
        for given, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(given, number)
        code = child.main([run_id])
    finally:
        os._exit(code)  # never back into the nursery's loop


if __name__ == "__main__":
    main()
