"""Tasks: what is trained and how it is scored. ADD A TASK: one file in this folder.

A task turns a comparison's spec into runs (`plan`) and does one run in one folder (`run`). It knows nothing of
queues or pages: the command line calls it in its own process, the queue in a child process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lab.registry import Registry


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: `method` is a registry id, or "base" for the untouched base model."""

    method: str
    seed: int
    knobs: dict[str, Any] = field(default_factory=dict)


# report(step, steps, **values): called at every step with e.g. loss=0.12, phase="training"; raises Cancelled
# when the run is to stop. It writes nothing the run needs: dropping every call changes no result.
Report = Callable[..., None]


class Cancelled(Exception):  # noqa: N818 - not an error
    """Raised by `report` inside a run that somebody cancelled."""


class Task(Protocol):
    """A task may also have `imports`, names of the modules that `run` needs: a queue's worker then imports them once
    for all its runs; `title(spec)`, what lists call a comparison, in place of its subject and methods; `base(spec)`, the
    base model of all its runs, which then has to stay what it was; and `compared = False` where no grid, table and report
    is made of all runs together."""

    id: str
    name: str

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with every default filled in. Raises LabError on bad values. Imports no torch."""
        ...

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        """The comparison's runs in the order they are to be done, the base model's first. Imports no torch."""
        ...

    def run(
        self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report
    ) -> dict[str, Any]:
        """Do (or go on with) one run.

        `inputs` holds the comparison's uploads, `folder` is the run's own: whatever an earlier attempt left there
        is used (checkpoints). Returns the run's results, which the caller saves as `result.json`.
        """
        ...


TASKS: Registry[Task] = Registry("task", "lab.tasks")
register = TASKS.register
