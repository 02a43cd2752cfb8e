"""Comparisons and their runs: submitted, listed, read, cancelled, retried, deleted. The page and the command line
see the queue through `Store` alone.

A comparison is a folder (uploads, one folder a run) and rows in one SQLite table; both appear together or not at
all. Every call names an owner, and an owner sees nothing of another's: a stranger's id and an id that does not exist
are the same error. Training happens elsewhere: `lab.jobs.ensure_worker(home)` starts whoever does it.
"""

from __future__ import annotations

import enum
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from lab.errors import LabError
from lab.jobs import disk, reading
from lab.jobs.folders import ID, comparison_folder, folder_name, new_id, run_folder, write_inputs
from lab.jobs.limits import check_room
from lab.jobs.table import Table
from lab.tasks import TASKS, PlannedRun

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
State = Literal["queued", "running", "done", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled")


class Anyone(enum.Enum):
    """Whoever keeps the machine sees all runs. Only code can name this owner: no text from outside equals it."""

    ANYONE = "anyone"


ANYONE = Anyone.ANYONE
Owner = str | Anyone


@dataclass(frozen=True)
class Run:
    """One run as its row stands now. Times are seconds since 1970; `eta_s` and `rate` (steps/s) are None if unknown."""

    id: str
    comparison: str
    task: str
    method: str  # a registry id, or "base"
    seed: int
    knobs: dict[str, Any]
    state: State
    phase: str  # what it is doing now, in a word or two: "training", "sampling"
    step: int
    steps: int
    rate: float | None
    eta_s: float | None
    message: str  # one sentence: why it failed, or what it waits for
    created: float
    started: float | None  # of the latest attempt
    finished: float | None
    heartbeat: float | None  # last sign of life
    attempt: int  # 0 before the first
    cancelling: bool  # asked to stop, not stopped yet
    folder: Path
    position: int | None  # 1: next in the queue; None when not queued

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def seconds(self) -> float | None:
        """How long the latest attempt took, or has taken so far."""
        if self.started is None:
            return None
        return max(0.0, (self.finished or time.time()) - self.started)

    def result(self) -> dict[str, Any] | None:
        """`result.json`, or None when the run is not done."""
        return reading.json_file(self.folder / "result.json") if self.state == "done" else None

    def preflight(self) -> str:
        """What the step before the first said of memory, as "fits: 9.1 of 24.0 GiB"; "" before it."""
        return str((reading.json_file(self.folder / "preflight.json") or {}).get("told", ""))[:80]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the result: what `lab.compare` and the command line take."""
        return asdict(self) | {"folder": str(self.folder), "result": self.result()}


@dataclass(frozen=True)
class Comparison:
    """A submitted spec and its runs, the base model's first."""

    id: str
    task: str
    title: str
    spec: dict[str, Any]
    created: float
    bytes: int  # on disk, when last measured
    folder: Path
    runs: list[Run]

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    @property
    def state(self) -> State:
        """running while anything goes on or is half done; then queued, failed, cancelled if any run is; else done."""
        states = {run.state for run in self.runs}
        if "running" in states or ("queued" in states and "done" in states):
            return "running"
        return next((state for state in ("queued", "failed", "cancelled") if state in states), "done")


def default_home() -> Path:
    """LAB_HOME, or the platform's user data folder: never the working or the temporary folder, which a page may serve."""
    if given := os.environ.get("LAB_HOME", "").strip():
        return Path(given).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_data_dir("nora-lab", appauthor=False)).resolve()


class Store:
    """The comparisons under one home folder. Cheap to open, safe to share between threads."""

    def __init__(self, home: Path | str | None = None) -> None:
        self.home = Path(home).expanduser().resolve() if home is not None else default_home()
        try:
            self._table = Table(self.home, durable=True)
        except OSError as error:
            raise LabError(f"The lab cannot write to its folder: {error.strerror}; set LAB_HOME to another.") from error

    def close(self) -> None:
        self._table.close()

    # -- submitting --------------------------------------------------------------------------------------
    def submit(
        self,
        owner: str,
        task_id: str,
        spec: dict[str, Any],
        images: list[Image.Image],
        files: Mapping[str, Path] | None = None,
    ) -> str:
        """Queue a comparison: one run for each that the task plans. Returns the comparison's id.

        `files` are further inputs by their names in the comparison's inputs, which come from code, never from outside.
        The pictures are written first, to a folder that nothing else sees; it becomes the comparison's in the
        transaction that writes the rows, so a crash at any point leaves either all of it or nothing.
        Raises LabError: bad spec, a limit reached, disk full.
        """
        if not isinstance(owner, str) or not 0 < len(owner) <= 256:
            raise ValueError("a submission needs an owner")
        task = TASKS[task_id]
        spec = task.check(spec | {"pictures": len(images)})
        planned = task.plan(spec)
        names = [folder_name(run) for run in planned]
        if not planned or len(set(names)) < len(names):
            raise LabError("This comparison has no runs, or the same run twice: choose different methods and seeds.")
        text = json.dumps(spec, ensure_ascii=False)
        if len(text) > 100_000:
            raise LabError(f"The settings are too long: {len(text)} characters, at most 100000; shorten the captions.")
        check_room(self._table, self.home, owner, len(planned))
        try:
            return self._submit(owner, task_id, spec, text, planned, images, files)
        except (OSError, sqlite3.Error) as error:
            if disk.is_full(error):
                raise LabError(
                    "The disk is full, so nothing was submitted: delete old comparisons and try again."
                ) from error
            raise

    def _submit(
        self,
        owner: str,
        task_id: str,
        spec: dict[str, Any],
        text: str,
        planned: list[PlannedRun],
        images: list[Image.Image],
        files: Mapping[str, Path] | None,
    ) -> str:
        cid, now = new_id(), time.time()
        title = _title(task_id, spec, planned)
        incoming, folder = self.home / "incoming" / cid, self._folder(cid)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            write_inputs(incoming, text, images, files)
            size = disk.size(incoming)
            with self._table.transaction():
                check_room(self._table, self.home, owner, len(planned))  # again: others submit at the same time
                self._table.write(
                    "INSERT INTO comparisons (id, owner, task, title, spec, created, bytes) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    *(cid, owner, task_id, title, text, now, size),
                )
                for run in planned:
                    self._table.write(
                        "INSERT INTO runs (id, comparison, owner, task, method, seed, knobs, created, queued) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        *(
                            new_id(),
                            cid,
                            owner,
                            task_id,
                            run.method,
                            run.seed,
                            json.dumps(run.knobs),
                            now,
                            now,
                        ),
                    )
                incoming.replace(folder)
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cid

    # -- reading -----------------------------------------------------------------------------------------
    def comparisons(self, owner: Owner) -> list[Comparison]:
        """The owner's comparisons, the newest first."""
        rows = self._table.read(
            "SELECT * FROM comparisons WHERE (? OR owner = ?) ORDER BY created DESC, rowid DESC", *_owned(owner)
        )
        runs: dict[str, list[Run]] = {}
        for run in self._runs("(? OR owner = ?)", *_owned(owner), order="number"):
            runs.setdefault(run.comparison, []).append(run)
        return [self._comparison(row, runs.get(row["id"], [])) for row in rows]

    def comparison(self, owner: Owner, comparison_id: str) -> Comparison:
        _check_id(comparison_id, "comparison")
        rows = self._table.read(
            "SELECT * FROM comparisons WHERE id = ? AND (? OR owner = ?)", comparison_id, *_owned(owner)
        )
        if not rows:
            raise _not_found("comparison")
        return self._comparison(rows[0], self._runs("comparison = ?", comparison_id, order="number"))

    def runs(
        self, owner: Owner, state: str | None = None, method: str | None = None, text: str | None = None
    ) -> list[Run]:
        """The owner's runs, the newest comparison first. `text` is looked for in title, task, method and message."""
        where, values = "(? OR owner = ?)", list(_owned(owner))
        if state:
            if state not in STATES:
                raise LabError(f"There is no state '{state}': choose one of {', '.join(STATES)}.")
            where, values = f"{where} AND state = ?", [*values, state]
        if method:
            where, values = f"{where} AND method = ?", [*values, method]
        if text and text.strip():
            like = "%" + re.sub(r"([\\%_])", r"\\\1", text.strip()[:200]) + "%"
            title = "(SELECT title FROM comparisons c WHERE c.id = comparison)"
            where += f" AND ({title} || ' ' || task || ' ' || method || ' ' || message) LIKE ? ESCAPE '\\'"
            values.append(like)
        return self._runs(where, *values, order="created DESC, comparison, number")

    def run(self, owner: Owner, run_id: str) -> Run:
        _check_id(run_id, "run")
        found = self._runs("id = ? AND (? OR owner = ?)", run_id, *_owned(owner), order="number")
        if not found:
            raise _not_found("run")
        return found[0]

    def log_tail(self, owner: Owner, run_id: str, lines: int = 40) -> str:
        """The log's last lines, without colour codes and without this machine's paths; "" before the first attempt."""
        return reading.tail(self.run(owner, run_id).folder / "log.txt", lines, hide=self.home)

    def metrics(self, owner: Owner, run_id: str, points: int = 400) -> list[dict[str, Any]]:
        """The run's records of training, step by step; at most about `points`, spread evenly, however long the run."""
        return reading.metrics(self.run(owner, run_id).folder / "metrics.jsonl", points)

    def _runs(self, where: str, *values: Any, order: str) -> list[Run]:
        rows = self._table.read(f"SELECT * FROM runs WHERE {where} ORDER BY {order}", *values)
        queued = any(row["state"] == "queued" for row in rows)
        positions = {id: n for n, id in enumerate(self._table.order(), start=1)} if queued else {}
        return [self._run(row, positions.get(row["id"])) for row in rows]

    def _run(self, row: sqlite3.Row, position: int | None) -> Run:
        same = ("id", "comparison", "task", "method", "seed", "state", "phase", "step", "steps", "rate", "message")
        times = ("created", "started", "finished", "heartbeat", "attempt")
        return Run(
            **{name: row[name] for name in same + times},
            knobs=json.loads(row["knobs"]),
            eta_s=row["eta"],
            cancelling=bool(row["cancel"]) and row["state"] == "running",
            folder=run_folder(self.home, row["comparison"], row["method"], row["seed"]),
            position=position,
        )

    def _comparison(self, row: sqlite3.Row, runs: list[Run]) -> Comparison:
        same = {name: row[name] for name in ("id", "task", "title", "created", "bytes")}
        return Comparison(**same, spec=json.loads(row["spec"]), folder=self._folder(row["id"]), runs=runs)

    # -- changing ----------------------------------------------------------------------------------------
    def cancel(self, owner: Owner, run_id: str) -> Run:
        """Stop a run: a queued one at once, a running one within two seconds. Its files stay; Retry goes on from them."""

        def stop() -> None:
            with self._table.transaction():
                run = self.run(owner, run_id)
                if run.state == "queued":
                    sql = "UPDATE runs SET state = 'cancelled', finished = ?, phase = '' WHERE id = ?"
                    self._table.write(sql, time.time(), run_id)
                elif run.state == "running":
                    self._table.write("UPDATE runs SET cancel = 1, phase = 'cancelling' WHERE id = ?", run_id)
                else:
                    raise LabError(f"This run is {run.state} already: there is nothing to cancel.")

        self._changing(stop)
        return self.run(owner, run_id)

    def cancel_comparison(self, owner: Owner, comparison_id: str) -> Comparison:
        """Cancel every run of it that is queued or running."""
        for run in reversed(self.comparison(owner, comparison_id).runs):  # the waiting ones first: none may start
            if not run.over:
                try:
                    self.cancel(owner, run.id)
                except LabError:
                    continue  # it ended meanwhile
        return self.comparison(owner, comparison_id)

    def retry(self, owner: Owner, run_id: str) -> Run:
        """Queue a failed or cancelled run again; it goes on from its last checkpoint, with its attempts counted anew."""
        run = self.run(owner, run_id)
        check_room(self._table, self.home, cast(str, self._table.run(run_id)["owner"]), 1, 0)
        sql = (
            "UPDATE runs SET state = 'queued', queued = ?, attempt = 0, cancel = 0, message = '', phase = '', "
            "rate = NULL, eta = NULL, started = NULL, finished = NULL WHERE id = ? AND state IN ('failed', 'cancelled')"
        )
        if not self._changing(lambda: self._table.write(sql, time.time(), run_id)):
            raise LabError(f"This run is {run.state}: only failed and cancelled runs can be retried.")
        return self.run(owner, run_id)

    def delete(self, owner: Owner, comparison_id: str) -> None:
        """Remove the comparison, its uploads, adapters and pictures for good. Refused while one of its runs is running."""
        folder = self._folder(self.comparison(owner, comparison_id).id)
        leaving = folder.with_name(f"{folder.name}.deleted")  # beside it: needs no room on a full disk

        def remove() -> None:
            with self._table.transaction():
                if any(run.state == "running" for run in self.comparison(owner, comparison_id).runs):
                    raise LabError("A run of this comparison is still going: cancel it first, then delete.")
                self._table.write("DELETE FROM comparisons WHERE id = ?", comparison_id)  # its runs go with it
                if folder.exists():
                    folder.replace(leaving)

        self._changing(remove)
        shutil.rmtree(leaving, ignore_errors=True)  # what is left after a crash here, the next worker sweeps away

    def _changing(self, change: Callable[[], T]) -> T:
        try:
            return self._table.with_room(change)
        except sqlite3.OperationalError as error:
            if disk.is_full(error):
                raise LabError(
                    "The disk is full, so this could not be written down: make room and try again."
                ) from error
            raise

    def _folder(self, comparison_id: str) -> Path:
        return comparison_folder(self.home, comparison_id)


def _check_id(id: Any, noun: str) -> None:
    # Before it can touch a path or a query: ids come from outside.
    if not isinstance(id, str) or not ID.fullmatch(id):
        raise _not_found(noun)


def _not_found(noun: str) -> LabError:
    return LabError(f"This {noun} was not found: it was deleted, or it is not yours.")


def _owned(owner: Owner) -> tuple[bool, str]:
    if not isinstance(owner, str | Anyone):
        raise TypeError(f"an owner is a string, got {type(owner).__name__}")
    return (True, "") if isinstance(owner, Anyone) else (False, owner)


def _title(task_id: str, spec: dict[str, Any], planned: list[PlannedRun]) -> str:
    if named := getattr(TASKS[task_id], "title", None):
        return named(spec)[:160]
    subject = spec.get("title") or spec.get("class_word") or TASKS[task_id].name
    methods = dict.fromkeys(run.method for run in planned if run.method != "base")
    return f"{str(subject)[:60]}: {', '.join(methods)}"[:160]
