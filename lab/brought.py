"""Architectures that visitors brought to the page: uploaded, pasted, or named. No torch.

Each is kept under a name made from its content, as a table of shapes in a folder of the lab's home, so that a link
to it works for anybody and after a restart; the oldest go when there are too many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import architectures
from lab.architectures import Architecture
from lab.errors import LabError
from lab.files import write_atomic
from lab.layer_tables import FIELDS

MOST_FILES, MOST_BYTES = 500, 100_000_000
AT_ONCE = 2  # models laid out at a time: each is a process of its own with torch in it
WAIT_S = 60.0


class Brought:
    """Brought architectures by their id; the last `most` in memory, more in the folder where there is one."""

    def __init__(self, most: int = 64, folder: Path | None = None) -> None:
        self._most, self._lock, self.folder = most, threading.Lock(), folder
        self._kept: OrderedDict[str, Architecture] = OrderedDict()

    def add(self, arch: Architecture) -> str:
        """Keep the architecture. Raises LabError when the disk is full."""
        table = to_table(arch)
        text = json.dumps(table, separators=(",", ":"), sort_keys=True)
        id = "own-" + hashlib.sha256(text.encode()).hexdigest()[:16]
        if self.folder is not None:
            self._sweep(len(text))
            write_atomic(self.folder / f"{id}.json", text)
        self._remember(id, arch)
        return id

    def get(self, id: str) -> Architecture:
        """The architecture of this id. Raises LabError when it is no longer kept."""
        with self._lock:
            if id in self._kept:
                return self._kept[id]
        path = self.folder / f"{id}.json" if self.folder is not None else None
        if path is None or not re.fullmatch(r"own-[0-9a-f]{16}", id) or not path.is_file():
            raise LabError("The page no longer has this architecture: upload its config.json or paste it again.")
        path.touch()
        return self._remember(id, architectures.parse(json.loads(path.read_text(encoding="utf-8"))))

    def _remember(self, id: str, arch: Architecture) -> Architecture:
        with self._lock:
            self._kept[id] = kept = dataclasses.replace(arch, id=id)
            self._kept.move_to_end(id)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return kept

    def _sweep(self, coming: int) -> None:
        """Make room for a file: the ones that nobody looked at for longest go."""
        assert self.folder is not None
        found = []
        for path in self.folder.glob("own-*.json"):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        found.sort(reverse=True)
        total = coming
        for number, (_, size, path) in enumerate(found, 2):
            total += size
            if number > MOST_FILES or total > MOST_BYTES:
                path.unlink(missing_ok=True)


def to_table(arch: Architecture) -> dict[str, Any]:
    """The table that `architectures.parse` reads."""
    head = {k: getattr(arch, k) for k in ("name", "parameters", "library", "source", "note", "unit", "memory")}
    layers = [
        [
            *(row.layer.name, row.layer.role, row.layer.out, row.layer.in_, row.layer.kernel, int(row.layer.bias)),
            *(row.part, row.block, row.tokens, int(row.grows), row.input, int(row.kept)),
        ]
        for row in arch.rows
    ]
    return {"id": "", **head, "fields": FIELDS, "layers": layers}


BROUGHT = Brought()
_places = threading.BoundedSemaphore(AT_ONCE)


def bring(kind: str, text: str, name: str = "") -> str:
    """Add an architecture from a configuration ("config"), a table ("table") or a Hub id ("hub"); its id.

    Raises LabError in one sentence when it cannot be read, and when too many are being laid out already.
    """
    name = re.sub(r"[^\w.\- ]", "", name)[:60]  # it is shown, and copied into commands
    makers: dict[str, Callable[[], Architecture]] = {
        "config": lambda: _in_turn(lambda: architectures.from_config(text, name or "uploaded configuration")),
        "table": lambda: architectures.from_table(text, "pasted table"),
        "hub": lambda: _in_turn(lambda: architectures.from_hub(text)),
    }
    if kind not in makers:
        raise LabError("An architecture is brought as a configuration, a table of shapes, or a model's name.")
    if kind == "config":
        architectures.check_config(text)  # what is refused at sight waits for nobody
    return BROUGHT.add(makers[kind]())


def _in_turn(make: Callable[[], Architecture]) -> Architecture:
    if not _places.acquire(timeout=WAIT_S):
        raise LabError("Other visitors' models are being laid out: try again in a minute.")
    try:
        return make()
    finally:
        _places.release()
