"""Where things are under the lab's home, and how they get there whole.

lab.db                            the table
comparisons/<id>/spec.json inputs/000.png… runs/<method>-s<seed>/…
incoming/<id>/                    a submission that is being written
deleted/<id>/                     a comparison that is being removed
attempts/<run id>.json            what a training process is told (lab/jobs/child.py)
worker-<device>.lock  .log        held by the device's one worker
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabError
from lab.jobs.table import Table
from lab.tasks import PlannedRun

if TYPE_CHECKING:
    from PIL import Image

ID = re.compile(r"[0-9a-f]{24}")
_METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
STRAY_SECONDS = 3600.0  # an unfinished submission older than this belongs to a process that died


def new_id() -> str:
    """96 random bits: knowing one id helps nobody to guess another."""
    return secrets.token_hex(12)


def comparison_folder(home: Path, comparison_id: str) -> Path:
    return home / "comparisons" / comparison_id


def run_folder(home: Path, comparison_id: str, method: str, seed: int) -> Path:
    return comparison_folder(home, comparison_id) / "runs" / f"{method}-s{seed}"


def folder_name(run: PlannedRun) -> str:
    """The run's folder in its comparison: `<method>-s<seed>`, also on the command line."""
    if not _METHOD.fullmatch(run.method):
        raise LabError(f"'{run.method[:64]}' is no method: see `python -m lab methods`.")
    return f"{run.method}-s{run.seed}"


def write_inputs(folder: Path, spec: str, images: list[Image.Image], files: Mapping[str, Path] | None = None) -> None:
    """A comparison's folder before its first run: spec.json, the pictures as PNG, nothing in them but pixels, and copies of
    files by the lab's own names for them."""
    (folder / "inputs").mkdir(mode=0o700, parents=True)
    (folder / "runs").mkdir()
    (folder / "spec.json").write_text(spec, encoding="utf-8")
    for number, image in enumerate(images):
        # Whatever `info` holds (EXIF with a place in it, a profile) is left out on purpose.
        image.convert("RGB").save(folder / "inputs" / f"{number:03d}.png", icc_profile=None, exif=b"", compress_level=3)
    for name, source in (files or {}).items():
        (folder / "inputs" / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, folder / "inputs" / name)  # files in the lab's home are written once and never changed
        except OSError:
            shutil.copyfile(source, folder / "inputs" / name)


def sweep(home: Path, table: Table) -> None:
    """Remove what processes that died left behind: half-written submissions, half-deleted comparisons."""
    for path in (home / "comparisons").glob("*.deleted"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (home / "incoming").glob("*"):
        if time.time() - path.lstat().st_mtime > STRAY_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    with table.transaction():  # a submission moves its folder in while it holds this lock
        known = {row["id"] for row in table.read("SELECT id FROM comparisons")}
        for path in (home / "comparisons").glob("*"):
            if ID.fullmatch(path.name) and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
