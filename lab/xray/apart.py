"""The X-ray in a process of its own, as it goes on: the page stays responsive and never imports torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lab.errors import LabError

SECONDS = 600.0  # one request may take
MEMORY_BYTES = 12 << 30  # and its process
AGAINST_BASE_S = 60.0  # of it for the base's singular directions
KEPT = 24  # results in memory, a few MB each at most
_known: OrderedDict[str, dict[str, Any]] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class Source:
    """An adapter to open: where it lies, how messages call it, and the base by id, or "" for its own."""

    path: Path
    name: str
    base: str = ""

    def key(self) -> list[Any]:
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return [str(self.path), self.base, *((f.stat().st_size, f.stat().st_mtime_ns) for f in files)]


class Step(NamedTuple):
    """How far it is; the last one has the result."""

    done: int
    total: int
    what: str
    result: dict[str, Any] | None = None


def analyse(source: Source) -> Iterator[Step]:
    """`lab.xray.report.analyse`, against the base where it is at hand. Raises LabError in its sentence."""
    return _asked("analyse", [source])


def compare(sources: Sequence[Source]) -> Iterator[Step]:
    """`lab.xray.report.compare`. Raises LabError in its sentence."""
    return _asked("compare", sources)


def _asked(what: str, sources: Sequence[Source]) -> Iterator[Step]:
    try:
        key = json.dumps([what, *(s.key() for s in sources)])
    except OSError:
        raise LabError("An adapter is not there any more: choose another.") from None
    with _lock:
        found = _known.get(key)
    if found is None:
        files = [{"path": str(s.path), "name": s.name, "base": s.base} for s in sources]
        for step in _run({"what": what, "files": files, "seconds": AGAINST_BASE_S, "memory": MEMORY_BYTES}):
            if step.result is None:
                yield step
            else:
                found = step.result
        if found is None:
            raise LabError("The X-ray ended without an answer: the adapter needs more memory than is given.")
        with _lock:
            _known[key] = found
            while len(_known) > KEPT:
                _known.popitem(last=False)
    yield Step(1, 1, "done", found)


def _run(request: dict[str, Any]) -> Iterator[Step]:
    """One child from its start to its end; closing the iterator ends it."""
    root = Path(__file__).resolve().parents[2]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # its matrices are small: a second thread only waits
    child = subprocess.Popen(
        [sys.executable, "-m", "lab.xray.child"],
        cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    late = threading.Event()
    clock = threading.Timer(SECONDS, lambda: (late.set(), child.kill()))
    clock.start()
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
        for line in child.stdout:
            said = json.loads(line)
            if "error" in said:
                raise LabError(said["error"])
            if "result" in said:
                yield Step(0, 0, "", said["result"])
                return  # without waiting for the child to tidy up
            yield Step(*said["at"])
        if late.is_set():
            raise LabError(f"The X-ray took more than {SECONDS:g} s: the adapter is too large for it.")
    finally:
        clock.cancel()
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
