"""Adapters that a visitor can open: their runs', and the files they sent, kept by owner under LAB_HOME/adapters. No torch.

A file lies under a random id that means something for its owner only, with the lab's own names inside; its header is
checked before it is kept. A reference is "run:<id>" or "file:<id>".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.adapter_files import CONFIG, WEIGHTS, check_file, refuse_pickle, unpack
from lab.adapter_files._header import name_of
from lab.errors import LabError
from lab.files import write_json
from lab.uploads import check_text

if TYPE_CHECKING:
    from lab.runs import Owner, Store

KEPT = 12  # files of one owner; older ones go first
KEPT_DAYS = 14
_ID = re.compile(r"[0-9a-f]{24}")
GONE = "This adapter is not there (any more): send the file again, or choose another."


@dataclass(frozen=True)
class Chosen:
    """An adapter of this owner: where it lies, what it is called, and the base and method where they are known."""

    ref: str
    title: str
    path: Path
    base: str = ""
    method: str = ""
    comparison: str = ""
    seed: int | None = None


def max_stored() -> int:
    """Bytes of one owner's files together (LAB_MAX_ADAPTERS_MB, default 3072)."""
    given = os.environ.get("LAB_MAX_ADAPTERS_MB", "").strip()
    return (int(given) if given.isdecimal() and int(given) else 3072) << 20


class Adapters:
    """One owner's files."""

    def __init__(self, home: Path, owner: str) -> None:
        self.folder = home / "adapters" / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def add(self, sent: Sequence[tuple[Path, str]]) -> str:
        """Keep what was sent, as (file, its name): one .safetensors, a zip, or a PEFT folder's two files. Returns its
        reference. Raises LabError in one sentence."""
        weights, config, title = _sorted(sent)
        check_text("The file's name", title, 300)
        id = secrets.token_hex(12)
        incoming = self.folder / f".incoming-{id}"
        incoming.mkdir(mode=0o700, parents=True)
        try:
            if weights[1].lower().endswith(".zip"):
                unpack(weights[0], incoming, weights[1])
            else:
                check_file(weights[0], weights[1], configured=True)  # before it is copied
                _place(weights[0], incoming / WEIGHTS)
            if config is not None:
                _take_config(config[0], incoming / CONFIG)
            check_file(incoming / WEIGHTS, f"{title}.safetensors", configured=(incoming / CONFIG).is_file())
            size = sum(f.stat().st_size for f in incoming.iterdir())
            self._make_room(size)
            write_json(incoming / "meta.json", {"title": title, "sent": time.time(), "bytes": size})
            incoming.replace(self.folder / id)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return f"file:{id}"

    def _make_room(self, size: int) -> None:
        if size > max_stored():
            raise LabError(f"The file has {size / 2**20:.0f} MB: at most {max_stored() >> 20} MB are kept.")
        kept = self.records()
        stored = sum(record["bytes"] for record in kept)
        while kept and (len(kept) >= KEPT or stored + size > max_stored()):
            oldest = kept.pop()
            stored -= oldest["bytes"]
            self.remove(oldest["id"])
        least = int(os.environ.get("LAB_MIN_FREE_MB", "").strip() or 256)
        if shutil.disk_usage(self.folder).free < least << 20:
            raise LabError("The lab's disk is nearly full, so the file was not kept: please try again later.")

    def records(self) -> list[dict[str, Any]]:
        """{"id", "title", "sent", "bytes"} of each file, newest first."""
        found: list[dict[str, Any]] = []
        for path in self.folder.glob("[0-9a-f]*/meta.json"):
            try:
                found.append({**json.loads(path.read_text(encoding="utf-8")), "id": path.parent.name})
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda record: -record["sent"])

    def get(self, id: str) -> Chosen:
        """Raises LabError for ids that are not this owner's, or do not exist."""
        folder = self.folder / id
        if not _ID.fullmatch(id) or not (folder / "meta.json").is_file():
            raise LabError(GONE)
        title = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["title"]
        os.utime(folder)  # what is used is not swept
        return Chosen(f"file:{id}", title, folder if (folder / CONFIG).is_file() else folder / WEIGHTS)

    def remove(self, id: str) -> None:
        if _ID.fullmatch(id):
            shutil.rmtree(self.folder / id, ignore_errors=True)


def _sorted(sent: Sequence[tuple[Path, str]]) -> tuple[tuple[Path, str], tuple[Path, str] | None, str]:
    """(weights or zip, configuration, title) of what was sent."""
    for path, name in sent:
        refuse_pickle(name, name_of(path, name))
    config = [(p, n) for p, n in sent if n.lower().endswith(".json")]
    weights = [(p, n) for p, n in sent if n.lower().endswith((".safetensors", ".zip"))]
    if len(weights) != 1 or len(config) > 1 or len(sent) != len(weights) + len(config):
        raise LabError(
            f"Send one .safetensors file, one zip, or {CONFIG} and {WEIGHTS} of a PEFT folder together; "
            f"{len(sent)} {'file was' if len(sent) == 1 else 'files were'} sent."
        )
    if config and weights[0][1].lower().endswith(".zip"):
        raise LabError(f"The zip holds its own {CONFIG}: send the zip alone.")
    title = re.sub(r"\.(safetensors|zip)$", "", weights[0][1], flags=re.IGNORECASE)
    return weights[0], config[0] if config else None, "".join(c for c in title if c.isprintable())[:80] or "adapter"


def _take_config(path: Path, to: Path) -> None:
    """A PEFT configuration, read and written anew."""
    if path.stat().st_size > 1 << 20:
        raise LabError(f"{CONFIG} has more than 1 MiB: an adapter's has some kilobytes.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not isinstance(given.get("peft_type"), str):
        raise LabError(f"The .json file is no {CONFIG}: it does not say which kind of adapter it describes.")
    write_json(to, given)


def _place(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


def sweep(home: Path, days: float = KEPT_DAYS) -> None:
    """Remove files that nobody opened for days, and what a crash left behind."""
    for folder in (home / "adapters").glob("*/*"):
        if folder.stat().st_mtime < time.time() - days * 86400 or folder.name.startswith(".incoming-"):
            shutil.rmtree(folder, ignore_errors=True)


# -- what can be opened -----------------------------------------------------------------------------------
def choices(store: Store, owner: str) -> list[Chosen]:
    """Everything that this owner can open: files, newest first, then finished runs, newest comparison first."""
    mine = Adapters(store.home, owner)
    files = [mine.get(record["id"]) for record in mine.records()]
    return files + [found for c in store.comparisons(owner) for run in c.runs if (found := _of_run(c, run))]


def chosen(store: Store, owner: str, ref: Any) -> Chosen:
    """The adapter of a reference from outside. Raises LabError for what is not this owner's."""
    kind, _, id = str(ref or "").partition(":")
    if kind == "file":
        return Adapters(store.home, owner).get(id)
    if kind == "run":
        run = store.run(owner, id)
        if found := _of_run(store.comparison(owner, run.comparison), run):
            return found
    raise LabError(GONE)


def _of_run(comparison: Any, run: Any) -> Chosen | None:
    """A finished run with an adapter in PEFT's folder layout."""
    from lab.methods import METHODS

    path = run.folder / "adapter"
    if run.state != "done" or not ((path / CONFIG).is_file() and (path / WEIGHTS).is_file()):
        return None
    method = METHODS[run.method].name if run.method in METHODS else run.method
    title = f"{comparison.title} · {method} · seed {run.seed}"
    base = str(comparison.spec.get("base", ""))
    return Chosen(f"run:{run.id}", title, path, base, run.method, comparison.id, run.seed)


def siblings(store: Store, owner: Owner, found: Chosen) -> list[Chosen]:
    """The other runs of its comparison: other seeds and other methods."""
    if not found.comparison:
        return []
    comparison = store.comparison(owner, found.comparison)
    runs = [x for run in comparison.runs if (x := _of_run(comparison, run))]
    return [x for x in runs if x.ref != found.ref]
