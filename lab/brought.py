"""Architectures that visitors brought to the page: uploaded, pasted, or named; kept in memory, bounded. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable

from lab import architectures
from lab.architectures import Architecture
from lab.errors import LabError


class Brought:
    """Uploaded and pasted architectures by a name made from their content; the last few are kept."""

    def __init__(self, most: int = 64) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[str, Architecture] = OrderedDict()

    def add(self, arch: Architecture) -> str:
        content = repr((arch.name, arch.parameters, [row.layer for row in arch.rows]))
        id = "own-" + hashlib.sha256(content.encode()).hexdigest()[:16]
        with self._lock:
            self._kept[id] = dataclasses.replace(arch, id=id)
            self._kept.move_to_end(id)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return id

    def get(self, id: str) -> Architecture:
        with self._lock:
            if id not in self._kept:
                raise LabError("The page no longer has this architecture: upload its config.json or paste it again.")
            return self._kept[id]


BROUGHT = Brought()


def bring(kind: str, text: str, name: str = "") -> str:
    """Add an architecture from a configuration ("config"), a table ("table") or a Hub id ("hub"); its id.

    Raises LabError in one sentence when it cannot be read.
    """
    name = re.sub(r"[^\w.\- ]", "", name)[:60]  # it is shown, and copied into commands
    makers: dict[str, Callable[[], Architecture]] = {
        "config": lambda: architectures.from_config(text, name or "uploaded configuration"),
        "table": lambda: architectures.from_table(text, "pasted table"),
        "hub": lambda: architectures.from_hub(text),
    }
    if kind not in makers:
        raise LabError("An architecture is brought as a configuration, a table of shapes, or a model's name.")
    return BROUGHT.add(makers[kind]())
