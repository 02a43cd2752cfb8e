"""What one owner may take of a machine that strangers share."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.jobs.table import Table


@dataclass(frozen=True)
class Limits:
    """What one owner may take of the machine; 0 means no limit. Read from the environment at every submission."""

    queued: int  # runs waiting or running, one owner
    queue: int  # runs waiting or running, everybody
    comparisons: int  # stored comparisons, one owner
    stored_mb: int  # their size on disk
    free_mb: int  # what must be left free on the disk

    @classmethod
    def from_environment(cls) -> Limits:
        def read(name: str, default: int) -> int:
            given = os.environ.get(name, "").strip()
            if given and not given.isdecimal():
                raise LabError(f"{name} must be a whole number, 0 or larger, got '{given}'.")
            return int(given) if given else default

        return cls(
            queued=read("LAB_MAX_QUEUED", 40),
            queue=read("LAB_MAX_QUEUE", 400),
            comparisons=read("LAB_MAX_COMPARISONS", 50),
            stored_mb=read("LAB_MAX_STORED_MB", 4096),
            free_mb=read("LAB_MIN_FREE_MB", 256),
        )


def check_room(table: Table, home: Path, owner: str, runs: int, comparisons: int = 1) -> None:
    """Raise LabError when so many more runs and comparisons of this owner are too many, or too much is stored."""
    limits = Limits.from_environment()
    going = "SELECT count(*) FROM runs WHERE state IN ('queued', 'running')"
    mine = table.read(f"{going} AND owner = ?", owner)[0][0]
    if limits.queued and mine + runs > limits.queued:
        raise LabError(
            f"That would be {mine + runs} runs of yours in the queue, at most {limits.queued} fit: "
            "choose fewer methods or seeds, or wait until some are done."
        )
    if limits.queue and table.read(going)[0][0] + runs > limits.queue:
        raise LabError("The queue is full with other people's runs: please try again later.")
    count, stored = table.read("SELECT count(*), ifnull(sum(bytes), 0) FROM comparisons WHERE owner = ?", owner)[0]
    if limits.comparisons and count + comparisons > limits.comparisons:
        raise LabError(
            f"You have {count} stored comparisons, at most {limits.comparisons} are kept: delete some first."
        )
    if limits.stored_mb and stored >= limits.stored_mb * 2**20:
        raise LabError(
            f"Your comparisons take {stored / 2**20:.0f} MB, at most {limits.stored_mb} MB are kept: delete some first."
        )
    free = shutil.disk_usage(home).free / 2**20
    if free < limits.free_mb:
        raise LabError(
            f"The lab's disk is nearly full ({free:.0f} MB free): delete old comparisons, then submit again."
        )
