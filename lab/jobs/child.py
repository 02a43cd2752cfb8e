"""One attempt at one run, in a process of its own: `python -m lab.jobs.child RUN_ID`.

Reads its orders (attempts/RUN_ID.json under LAB_HOME), calls `Task.run`, writes into the run's folder: progress.json
(at most four times a second), result.json, and last outcome.json, how it ended. It never opens the table, so it may
run on any machine that sees the folder. Whatever way it dies, its worker knows.
Processes that are kept for several attempts call `attempt` themselves (warm.py, resident.py).

LAB_EXTRA_TASKS names modules (between commas) that register further tasks: for whoever starts the lab, never for a
visitor, because it runs code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.files import write_json
from lab.jobs import disk, processes, reading
from lab.tasks import TASKS, Cancelled, PlannedRun

WRITE_SECONDS = 0.25
BEAT_SECONDS = 1.0
# Exit codes, for when even outcome.json could not be written.
DONE, FAILED, CANCELLED, DISK_FULL, NO_MEMORY = 0, 1, 3, 4, 5
CRASHED = 128 + signal.SIGKILL  # through no fault of the attempt's: it is made again
OUT_OF_MEMORY = (
    "Memory ran out: choose a smaller batch, resolution or rank, or close other programs, and press Retry; "
    "the run goes on from its last checkpoint."
)


class Progress:
    """The `report` that a task calls at every step: passes it on, throttled, and stops the run when asked to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stopping = False
        self._lock = threading.Lock()  # the run's thread and the one that shows signs of life
        self._phase, self._step, self._steps = "loading", 0, 0
        self._written, self._late = 0.0, True  # when last written; whether something newer is to be written
        self._seen: deque[tuple[float, int]] = deque(maxlen=40)  # about the last ten seconds

    def __call__(self, step: int, steps: int, **values: Any) -> None:
        if self.stopping:
            raise Cancelled
        now, phase = time.monotonic(), str(values.get("phase", self._phase))[:60]
        fresh = phase != self._phase or step < self._step
        with self._lock:
            self._phase, self._step, self._steps, self._late = phase, int(step), int(steps), True
            if fresh:
                self._seen.clear()
            if fresh or step >= steps or now - self._written >= WRITE_SECONDS:
                self._seen.append((now, self._step))
                self._write(now)

    def beat(self) -> None:
        """A sign of life between two steps, with the last step's news if they were held back."""
        with self._lock:
            if self._late:
                self._write(time.monotonic())
            else:
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def _write(self, now: float) -> None:
        (t0, first), (t1, last) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        rate = (last - first) / (t1 - t0) if last > first and t1 - t0 > 0.05 else None
        values = {
            "phase": self._phase,
            "step": self._step,
            "steps": self._steps,
            "rate": rate,
            "eta": (self._steps - self._step) / rate if rate else None,  # of this phase
        }
        self._written, self._late = now, False
        with contextlib.suppress(OSError):  # a full disk: the run itself will meet it where it matters, when it saves
            reading.write_json(self.path, values)


def main(arguments: list[str]) -> int:
    parent = int(os.environ.get("LAB_PARENT", "0"))
    if parent:
        if not processes.die_with(parent):
            return CANCELLED
        processes.volunteer_for_oom()
    faulthandler.enable()  # a segmentation fault leaves its stack in the log
    from lab.runs import default_home

    return attempt(default_home(), arguments[0], parent)


def attempt(home: Path, run_id: str, parent: int = 0) -> int:
    """Do the attempt that the orders tell of, in this process; its exit code. SIGTERM stops it."""
    orders, path = read_orders(home, run_id), orders_path(home, run_id)
    folder, over = home / orders["folder"], threading.Event()
    with contextlib.suppress(OSError):
        (folder / "pid").write_text(str(os.getpid()))
    _say(f"--- attempt {orders['attempt']}, {time.strftime('%Y-%m-%d %H:%M:%S')} ---")
    progress = Progress(folder / "progress.json")
    signal.signal(signal.SIGTERM, lambda *_: setattr(progress, "stopping", True))
    progress.beat()
    watch = threading.Thread(target=_watch, args=(progress, parent, path, orders["token"], over), daemon=True)
    watch.start()
    try:
        write_json(folder / "result.json", _finite(_run(home, orders, folder, progress)))
    except BaseException as error:  # a task's SystemExit too
        code, message = explain(error, folder)
    else:
        code, message = DONE, ""
    over.set()
    watch.join()  # nothing is written once the end is told
    if _replaced(path, orders["token"]):
        return CANCELLED  # the end of the attempt in its place is the one to be told
    progress.beat()  # where it ended
    return _tell(folder, orders["token"], code, message)


def orders_path(home: Path, run_id: str) -> Path:
    return home / "attempts" / f"{Path(run_id).name}.json"


def read_orders(home: Path, run_id: str) -> dict[str, Any]:
    return json.loads(orders_path(home, run_id).read_text(encoding="utf-8"))


def import_extras() -> None:
    for module in filter(None, os.environ.get("LAB_EXTRA_TASKS", "").split(",")):
        importlib.import_module(module.strip())


def import_for(home: Path, run_id: str) -> None:
    """Import what the ordered run's task says it needs."""
    try:
        import_extras()
        for module in getattr(TASKS[read_orders(home, run_id)["task"]], "imports", ()):
            importlib.import_module(module)
    except Exception as error:
        # Not for here to tell: the attempt meets it again, where it becomes the run's message.
        print(f"imports: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def open_log(home: Path, run_id: str) -> int:
    """A descriptor of the ordered run's log, for appending."""
    folder = home / read_orders(home, run_id)["folder"]
    return os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _run(home: Path, orders: dict[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    import_extras()
    planned = PlannedRun(orders["method"], orders["seed"], orders["knobs"])
    return TASKS[orders["task"]].run(orders["spec"], planned, home / orders["inputs"], folder, progress)


def explain(error: BaseException, folder: Path) -> tuple[int, str]:
    """Exit code and one sentence for what ended the run; prints the stack to the log where it says more."""
    if isinstance(error, Cancelled | KeyboardInterrupt):
        return CANCELLED, ""
    if isinstance(error, LabError):
        # One that says in its own words that the disk is full: the code has to say it too, see `_tell`.
        if disk.is_full(error.__cause__ or error.__context__):
            return DISK_FULL, disk.sentence(folder)
        return FAILED, _one_line(str(error))
    _say("".join(traceback.format_exception(error)))
    if disk.is_full(error):
        return DISK_FULL, disk.sentence(folder)
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return NO_MEMORY, OUT_OF_MEMORY
    first = _one_line(str(error).strip().partition("\n")[0])
    return FAILED, f"The run stopped on an error ({type(error).__name__}: {first[:200]}); its log says where."


def _tell(folder: Path, token: str, code: int, message: str) -> int:
    if message:
        _say(message)
    state = {DONE: "done", CANCELLED: "cancelled"}.get(code, "failed")
    try:
        reading.write_json(folder / "outcome.json", {"token": token, "state": state, "message": message})
    except OSError as error:
        # The exit code alone has to say it. Without an outcome a run is not done, so "done" becomes what went wrong.
        _say(f"outcome.json: {error}")
        return code or (DISK_FULL if disk.is_full(error) else FAILED)
    return code


def _watch(progress: Progress, parent: int, orders: Path, token: str, over: threading.Event) -> None:
    """Signs of life until the attempt is over.

    Ends the process when its worker is gone (where the system has not done so already), and when another attempt has
    been started in its place, because somebody believed this one lost: two would write into one folder.
    """
    while not over.wait(BEAT_SECONDS):
        progress.beat()
        if (parent and os.getppid() != parent) or _replaced(orders, token):
            if os.getpgrp() == os.getpid():
                os.killpg(os.getpid(), signal.SIGKILL)
            os._exit(CANCELLED)


def _replaced(orders: Path, token: str) -> bool:
    """Whether another attempt at the same run has been started since, or even come to its end (which takes the orders
    away)."""
    now = reading.json_file(orders)
    return not orders.exists() if now is None else now.get("token") != token


def _say(text: str) -> None:
    """To the log, which may be on the disk that is full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: None instead, so that every reader can read it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # nothing is left to do: no waiting for threads or for CUDA to unload
