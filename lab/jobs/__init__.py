"""The queue: who does the runs that the store holds. ADD A BACKEND: one file here that registers a `Backend`.

The page never trains. A submitted run waits in the table (`table.py`); one worker process a device (`worker.py`)
takes it and starts one training process for each attempt, `python -m lab.jobs.child RUN_ID`, where the backend
says: on this machine (`local.py`, which keeps a process ready: `warm.py`, `resident.py`) or on a Ray cluster
(`ray.py`). The worker alone writes the table; the training
process reads one file (its orders) and writes files into its run's folder. So whatever is killed, the page, the
worker or the training process, the run goes on from its last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab.registry import Registry


@dataclass(frozen=True)
class Orders:
    """One attempt at one run: what a backend is told to start."""

    home: Path
    run_id: str
    attempt: int
    token: str  # of this attempt alone: no other attempt at any run has the same
    folder: Path  # the run's; output goes to log.txt in it
    device: str  # which of the backend's devices


class Attempt(Protocol):
    """A training process that was started. No method waits."""

    def poll(self) -> int | None:
        """None while it runs, then its exit code; -N (or 128 + N): ended by signal N."""
        ...

    def stop(self) -> None:
        """Ask it and everything it started to end (SIGTERM)."""
        ...

    def kill(self) -> None:
        """End it and everything it started (SIGKILL)."""
        ...


class Backend(Protocol):
    id: str
    name: str
    detached: bool  # attempts go on when their worker ends

    def devices(self) -> Sequence[str]:
        """Names of what needs a worker each."""
        ...

    def slots(self) -> int:
        """How many attempts one worker has under way at a time."""
        ...

    def check(self) -> None:
        """Raise LabError when this backend cannot work here (something is not installed)."""
        ...

    def start(self, orders: Orders) -> Attempt:
        """Start the training process. Raises LabError when that is impossible now but may be later."""
        ...

    def find(self, orders: Orders) -> Attempt | None:
        """The attempt that a worker which died had started, if it goes on without that worker."""
        ...

    def rest(self) -> None:
        """Nothing has been under way for a while: let go of what was kept ready for the next attempt."""
        ...


BACKENDS: Registry[Backend] = Registry("queue backend", "lab.jobs")
register = BACKENDS.register


def backend() -> Backend:
    """The backend that LAB_BACKEND names (default: local). Raises LabError for an unknown name."""
    return BACKENDS[os.environ.get("LAB_BACKEND", "").strip().lower() or "local"]


def ensure_worker(home: Path) -> int:
    """Start, detached from this process, the workers that are missing; how many were started.

    Takes well under a millisecond when all run: call it at every submission and every few seconds.
    Raises LabError when the backend cannot work here.
    """
    from lab.jobs.workers import ensure

    return ensure(home, backend())
