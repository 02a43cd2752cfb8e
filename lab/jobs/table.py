"""The queue's table: one SQLite file, in WAL mode, that the page, the command line and the workers open together.

A run's row is the only truth about its state, and only two writers change it: the store (submit, cancel, retry,
delete) and the worker that holds the run's device (everything else). The training process writes files alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from lab.jobs import disk

T = TypeVar("T")
VERSION = 1
RESERVE_BYTES = 2**20
SCHEMA = """
CREATE TABLE comparisons (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, task TEXT NOT NULL, title TEXT NOT NULL, spec TEXT NOT NULL,
    created REAL NOT NULL, bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX comparisons_by_owner ON comparisons (owner, created);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    comparison TEXT NOT NULL REFERENCES comparisons (id) ON DELETE CASCADE,
    owner TEXT NOT NULL, task TEXT NOT NULL, method TEXT NOT NULL, seed INTEGER NOT NULL, knobs TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    phase TEXT NOT NULL DEFAULT '', step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0,
    rate REAL, eta REAL, message TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL, queued REAL NOT NULL, started REAL, finished REAL, heartbeat REAL,
    attempt INTEGER NOT NULL DEFAULT 0, cancel INTEGER NOT NULL DEFAULT 0, worker TEXT NOT NULL DEFAULT ''
);
CREATE INDEX runs_by_owner ON runs (owner, created);
CREATE INDEX runs_by_start ON runs (owner, started);
CREATE INDEX runs_by_state ON runs (state);
CREATE INDEX runs_by_comparison ON runs (comparison, number);
"""

# Owners take turns, each one's runs in the order they were submitted; a run that was interrupted comes first among
# its owner's. So a visitor with one comparison does not wait for the forty runs of another.
ORDER = """
WITH waiting AS (
    SELECT id, owner, attempt, number,
           row_number() OVER (PARTITION BY owner ORDER BY attempt > 0 DESC, queued, number) AS turn
    FROM runs WHERE state = 'queued'
)
SELECT id FROM waiting w
ORDER BY turn, attempt > 0 DESC, (SELECT max(started) FROM runs s WHERE s.owner = w.owner), number
"""


class Table:
    """One connection, usable from any thread. Opening takes about a millisecond.

    `durable`: every commit reaches the disk before it returns (the store: a submitted comparison survives a power
    cut); without it only a crash of the process is survived (the worker's progress, several times a second).
    """

    def __init__(self, home: Path, durable: bool = False) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)  # other people's pictures: not for other users to read
        self.path, self._reserve = home / "lab.db", home / "reserve"
        self._lock = threading.RLock()
        self._db = sqlite3.connect(self.path, timeout=15, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        if self._db.execute("PRAGMA user_version").fetchone()[0] < VERSION:
            self._create()

    def _create(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        with self.transaction():
            if self._db.execute("PRAGMA user_version").fetchone()[0] < VERSION:  # another process may have been first
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def write(self, sql: str, *values: Any) -> int:
        """Run one statement; the number of rows it changed."""
        with self._lock:
            return self._db.execute(sql, values).rowcount

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """All or nothing. Takes the write lock at once, so that what is read inside stays true."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def with_room(self, change: Callable[[], T]) -> T:
        """Do a change; on a full disk give the reserve up and do it once more, so that one can still delete things."""
        try:
            return change()
        except sqlite3.OperationalError as error:
            if not disk.is_full(error) or not self.release_reserve():
                raise
            return change()

    def keep_reserve(self) -> None:
        """Keep a little of the disk back, for the day when all else is full and the table has to say so."""
        with contextlib.suppress(OSError):
            if not self._reserve.exists() and shutil.disk_usage(self._reserve.parent).free > 8 * RESERVE_BYTES:
                self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # random: a file system may compress zeros away

    def release_reserve(self) -> bool:
        """Whether there was something to give up."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    # -- the queue ---------------------------------------------------------------------------------------
    def order(self) -> list[str]:
        """Ids of the queued runs, in the order in which one worker would take them."""
        return [row["id"] for row in self.read(ORDER)]

    def claim(self, worker: str) -> sqlite3.Row | None:
        """Mark the next queued run as running on this worker, and count the attempt."""
        if not self.read("SELECT 1 FROM runs WHERE state = 'queued' LIMIT 1"):
            return None
        with self.transaction():
            first = self.read(f"{ORDER} LIMIT 1")
            if not first:
                return None
            now, id = time.time(), first[0]["id"]
            self.write(
                "UPDATE runs SET state = 'running', worker = ?, attempt = attempt + 1, cancel = 0, started = ?, "
                "heartbeat = ?, finished = NULL, phase = 'starting', message = '', rate = NULL, eta = NULL WHERE id = ?",
                *(worker, now, now, id),
            )
            return self.run(id)

    def run(self, id: str) -> sqlite3.Row:
        """The run's row together with its comparison's spec."""
        return self.read("SELECT r.*, c.spec FROM runs r JOIN comparisons c ON c.id = r.comparison WHERE r.id = ?", id)[
            0
        ]

    def running(self, worker: str | None = None) -> list[sqlite3.Row]:
        sql = "SELECT r.*, c.spec FROM runs r JOIN comparisons c ON c.id = r.comparison WHERE r.state = 'running'"
        return self.read(f"{sql} AND worker = ?", worker) if worker is not None else self.read(sql)

    def to_cancel(self, worker: str) -> set[str]:
        rows = self.read("SELECT id FROM runs WHERE state = 'running' AND cancel = 1 AND worker = ?", worker)
        return {row["id"] for row in rows}

    def progress(self, id: str, attempt: int, values: dict[str, Any]) -> None:
        """Set phase, step, steps, rate and eta, and that the run lives. Ignored once the attempt is over."""
        self.write(
            "UPDATE runs SET phase = ?, step = ?, steps = ?, rate = ?, eta = ?, heartbeat = ? "
            "WHERE id = ? AND attempt = ? AND state = 'running'",
            *(values["phase"], values["step"], values["steps"], values["rate"], values["eta"]),
            *(time.time(), id, attempt),
        )

    def finish(self, id: str, state: str, message: str = "", bytes: int | None = None) -> None:
        """End the run. `bytes`: what its comparison now takes on disk."""
        with self.transaction():
            self.write(
                "UPDATE runs SET state = ?, message = ?, finished = ?, eta = NULL, cancel = 0, worker = '', "
                "phase = CASE WHEN ? = 'done' THEN 'done' ELSE phase END WHERE id = ? AND state = 'running'",
                *(state, message, time.time(), state, id),
            )
            if bytes is not None:
                self.write(
                    "UPDATE comparisons SET bytes = ? WHERE id = (SELECT comparison FROM runs WHERE id = ?)", bytes, id
                )

    def requeue(self, id: str, phase: str, message: str = "", counted: bool = True) -> None:
        """Put a running run back at its old place; `counted=False`: the attempt was ended by us, it does not count."""
        self.write(
            "UPDATE runs SET state = CASE WHEN cancel = 1 THEN 'cancelled' ELSE 'queued' END, phase = ?, worker = '', "
            "message = CASE WHEN cancel = 1 THEN '' ELSE ? END, rate = NULL, eta = NULL, attempt = attempt - ?, "
            "finished = CASE WHEN cancel = 1 THEN ? END, cancel = 0 WHERE id = ? AND state = 'running'",
            *(phase, message, 0 if counted else 1, time.time(), id),
        )
