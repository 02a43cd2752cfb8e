"""The worker: takes runs off the queue and sees each to its end. One process a device, `python -m lab jobs worker`.

It holds a lock on `worker-<name>.lock` for as long as it lives. Whoever has the lock may be sure that a run which
the table calls running on this worker has nobody, and puts it back into the queue.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.jobs import Attempt, Backend, Orders, backend, disk, processes, reading, workers
from lab.jobs.child import CANCELLED, DISK_FULL, DONE, NO_MEMORY, OUT_OF_MEMORY, orders_path
from lab.jobs.folders import comparison_folder, run_folder, sweep
from lab.jobs.table import Table

ATTEMPTS = 3  # a run that crashed or was interrupted this often is failed
GRACE_SECONDS = 0.7  # between SIGTERM and SIGKILL
TICK_SECONDS = 0.1
IDLE_TICK_SECONDS = 0.3
REST_SECONDS = 300.0  # of idleness, before what is kept ready for the next run is let go
LATER_SECONDS = 10.0  # before a backend that could not start something is asked again
STRAY_SECONDS = 30.0  # how often runs of workers that no longer exist are looked for

CRASHES = {
    "SIGKILL": "was stopped by the system, most likely out of memory",
    "SIGTERM": "was stopped from outside",
    "SIGSEGV": "crashed (segmentation fault)",
}


@dataclass
class Watched:
    """An attempt under way."""

    row: sqlite3.Row
    orders: Orders
    attempt: Attempt
    asked: float | None = None  # when it was asked to stop
    why: str = ""  # "cancel": somebody cancelled it; "shutdown": this worker is told to end
    killed: bool = False
    copied: float = field(default=0.0)
    changed: int = 0  # of progress.json, when last read

    @property
    def id(self) -> str:
        return self.row["id"]


class Worker:
    def __init__(self, home: Path, backend: Backend, device: str) -> None:
        self.home, self.backend, self.device = home.resolve(), backend, device
        self.name = workers.name(backend.id, device)
        self.lock = processes.Lock(workers.lock_path(self.home, backend.id, device))
        self.stopping = False
        self._active: list[Watched] = []
        self._adopted = False
        self._later, self._looked = 0.0, -STRAY_SECONDS

    def serve(self, drain: bool = False, idle_seconds: float = 900.0) -> None:
        """Work until told to stop (SIGTERM), idle for `idle_seconds`, or with `drain` until the queue is empty.

        Returns at once when another worker has the device.
        """
        if not self.lock.take(patience=2.0):
            _log(f"{self.name}: another worker is at work")
            return
        self.table = Table(self.home)
        _log(f"{self.name}: worker {os.getpid()} at work")
        sweep(self.home, self.table)
        busy = time.monotonic()
        while not (self.stopping and not self._active) and self.table.path.exists():
            try:
                self._turn()
            except sqlite3.OperationalError as error:  # busy or full: the table is as it was, so do the same again
                _log(f"{self.name}: {error}")
                if not (disk.is_full(error) and self.table.release_reserve()):
                    time.sleep(1.0)
                continue
            if self._active:
                busy = time.monotonic()
            elif (drain or time.monotonic() - busy > idle_seconds) and self._leave():
                break
            if time.monotonic() - busy > REST_SECONDS:
                self.backend.rest()
            time.sleep(TICK_SECONDS if self._active else IDLE_TICK_SECONDS)
        self.backend.rest()
        _log(f"{self.name}: worker {os.getpid()} ends")
        self.lock.release()

    def _leave(self) -> bool:
        """Let go of the lock, then look once more: a run submitted just before saw a worker and started none."""
        if self.table.order():
            return False
        self.lock.release()
        return not self.table.order() or not self.lock.take()

    def _turn(self) -> None:
        if not self._adopted:
            self._adopt(self.name)
            self._adopted = True
        cancelled = self.table.to_cancel(self.name)
        for watched in list(self._active):
            self._see_to(watched, watched.id in cancelled)
        if self.stopping:
            return
        now = time.monotonic()
        if now - self._looked > STRAY_SECONDS:
            self._looked = now
            self.table.keep_reserve()
            self._adopt_strays()
        while len(self._active) < self.backend.slots() and now >= self._later:
            row = self.table.claim(self.name)
            if row is None:
                break
            self._start(row)

    # -- one attempt -------------------------------------------------------------------------------------
    def _start(self, row: sqlite3.Row) -> None:
        orders = self._orders(row)
        try:
            self._write_orders(row, orders)
            attempt = self.backend.start(orders)
        except LabError as error:
            self.table.requeue(row["id"], "waiting", str(error), counted=False)
            self._later = time.monotonic() + LATER_SECONDS
        except OSError as error:
            full = disk.is_full(error)
            message = disk.sentence(self.home) if full else f"The run could not be started ({error.strerror})."
            self.table.finish(row["id"], "failed", message)
            _log(f"{self.name}: {row['id']} could not be started: {error}")
        else:
            self._active.append(Watched(row, orders, attempt))

    def _orders(self, row: sqlite3.Row) -> Orders:
        folder = run_folder(self.home, row["comparison"], row["method"], row["seed"])
        token = f"{row['id']}-{row['attempt']}-{round(row['started'] * 1000)}"
        return Orders(self.home, row["id"], row["attempt"], token, folder, self.device)

    def _write_orders(self, row: sqlite3.Row, orders: Orders) -> None:
        orders.folder.mkdir(parents=True, exist_ok=True)
        for stale in ("outcome.json", "progress.json"):
            (orders.folder / stale).unlink(missing_ok=True)
        comparison = comparison_folder(self.home, row["comparison"])
        path = orders_path(self.home, row["id"])
        path.parent.mkdir(mode=0o700, exist_ok=True)
        told = {name: row[name] for name in ("task", "method", "seed", "attempt")}
        told |= {"token": orders.token, "spec": json.loads(row["spec"]), "knobs": json.loads(row["knobs"])}
        told |= {"folder": str(orders.folder.relative_to(self.home))}  # relative: elsewhere home may be elsewhere
        reading.write_json(path, told | {"inputs": str((comparison / "inputs").relative_to(self.home))})

    def _see_to(self, watched: Watched, cancelled: bool) -> None:
        """Pass its progress on, stop it if it is to stop, and see whether it has ended."""
        if not watched.asked and (cancelled or (self.stopping and not self.backend.detached)):
            watched.asked, watched.why = time.monotonic(), "cancel" if cancelled else "shutdown"
            watched.attempt.stop()
        code = watched.attempt.poll()
        if code is not None:
            self._end(watched, code)
            self._active.remove(watched)
        elif watched.asked:
            if not watched.killed and time.monotonic() - watched.asked > GRACE_SECONDS:
                watched.killed = True
                watched.attempt.kill()
        elif self.stopping:
            self._active.remove(watched)  # it goes on without us; the next worker finds it
        else:
            self._copy_progress(watched)

    def _copy_progress(self, watched: Watched) -> None:
        path, now = watched.orders.folder / "progress.json", time.monotonic()
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return
        if changed == watched.changed or now - watched.copied < 0.25:
            return
        values = reading.json_file(path)
        if values:
            watched.changed, watched.copied = changed, now
            self._write_progress(watched, values)

    def _end(self, watched: Watched, code: int) -> None:
        """Write how the attempt ended. May be called again for the same attempt if the table could not be written."""
        row, bytes = watched.row, disk.size(comparison_folder(self.home, watched.row["comparison"]))
        self._copy_last_progress(watched)
        state, message = self._outcome(watched.orders, code)
        if state != "done" and watched.why == "cancel":
            self.table.finish(row["id"], "cancelled", "", bytes)
        elif state in ("crashed", "cancelled") and watched.why == "shutdown":
            self.table.requeue(
                row["id"], "waiting", "The worker was stopped; the run goes on with the next.", counted=False
            )
        elif state == "crashed":
            self._interrupted(row, message, bytes)
        else:
            self.table.finish(row["id"], state, message, bytes)
        orders_path(self.home, row["id"]).unlink(missing_ok=True)

    def _copy_last_progress(self, watched: Watched) -> None:
        values = reading.json_file(watched.orders.folder / "progress.json")
        if values:
            self._write_progress(watched, values)

    def _write_progress(self, watched: Watched, values: dict[str, Any]) -> None:
        with contextlib.suppress(sqlite3.OperationalError):  # full: the room kept back is for how the run ends
            self.table.progress(watched.id, watched.row["attempt"], values)

    def _interrupted(self, row: sqlite3.Row, what: str, bytes: int | None = None) -> None:
        """Again, from the last checkpoint, unless this happened too often."""
        if row["attempt"] < ATTEMPTS:
            self.table.requeue(row["id"], "to be resumed", f"The run {what}; it goes on from its last checkpoint.")
        else:
            advice = ": choose a smaller batch, resolution or rank, then press Retry" if "memory" in what else ""
            times = f"{row['attempt']} times" if row["attempt"] > 1 else "once"
            self.table.finish(
                row["id"], "failed", f"The run {what}, {times}{advice}; its log's last lines are below.", bytes
            )

    def _outcome(self, orders: Orders, code: int) -> tuple[str, str]:
        """(done | failed | cancelled | crashed, sentence). For "crashed" the sentence lacks its subject, the run."""
        told = reading.json_file(orders.folder / "outcome.json")
        if told and told.get("token") == orders.token and told.get("state") in ("done", "failed", "cancelled"):
            return told["state"], str(told.get("message", ""))
        number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
        if number:
            name = processes.signal_name(number)
            return "crashed", CRASHES.get(name, f"crashed ({name})")
        known = {DISK_FULL: ("failed", disk.sentence(self.home)), NO_MEMORY: ("failed", OUT_OF_MEMORY)}
        known |= {CANCELLED: ("cancelled", "")}
        if code == DONE:
            return "failed", "The run ended without a result; its log's last lines are below."
        return known.get(code, ("failed", f"The run ended with exit code {code}; its log's last lines are below."))

    # -- runs without a worker ---------------------------------------------------------------------------
    def _adopt_strays(self) -> None:
        """Runs of workers that exist no more: another backend's, a GPU's that was taken out."""
        for name in {row["worker"] for row in self.table.running()} - {self.name}:
            lock = processes.Lock(self.home / f"worker-{name}.lock")
            if lock.take():
                self._adopt(name)
                lock.release()

    def _adopt(self, name: str) -> None:
        """See to the runs that the table calls running on a worker whose lock we hold."""
        watched = {watched.id for watched in self._active}
        for row in self.table.running(name):
            if row["id"] in watched:
                continue
            orders = self._orders(row)
            attempt = self.backend.find(orders) if name == self.name else None
            state, message = self._outcome(orders, CANCELLED)
            if attempt is not None:
                self._active.append(Watched(row, orders, attempt))
            elif state in ("done", "failed"):  # it had ended, and nobody was there to write it down
                self.table.finish(row["id"], state, message, disk.size(comparison_folder(self.home, row["comparison"])))
            elif row["cancel"]:
                self.table.finish(row["id"], "cancelled")
            else:
                self._interrupted(row, "was interrupted (the computer or the worker stopped)")


def _log(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)


def work(home: Path, device: str | None = None, drain: bool = False) -> dict[str, Any]:
    """Be the worker of one device (default: the backend's first), until SIGTERM or SIGINT, or idle for long."""
    chosen = backend()
    chosen.check()
    worker = Worker(home, chosen, device or chosen.devices()[0])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(worker, "stopping", True))
    worker.serve(drain, float(os.environ.get("LAB_WORKER_IDLE_SECONDS", "900")))
    return {"worker": worker.name, "home": str(worker.home)}


def main(arguments: list[str]) -> None:
    """`python -m lab.jobs.worker`: as `python -m lab jobs worker`, without importing the other commands."""
    from lab.runs import default_home

    parser = argparse.ArgumentParser(prog="python -m lab.jobs.worker")
    parser.add_argument("--device")
    parser.add_argument("--drain", action="store_true")
    args = parser.parse_args(arguments)
    work(default_home(), args.device, args.drain)


if __name__ == "__main__":
    main(sys.argv[1:])
