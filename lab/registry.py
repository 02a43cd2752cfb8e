"""One registry for methods, tasks, bases, plots and queue backends.

A member is added by adding a file to the registry's package: the package is scanned on first use, every
module in it is imported and registers what it holds. Nothing else in the lab changes. Modules whose name
starts with an underscore are not imported by the scan: what needs torch at import time lives there.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from lab.errors import LabError


class Named(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Named)


def unknown(noun: str, given: str, known: list[str]) -> LabError:
    """The error for a name that does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(given.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}."
    return LabError(f"Unknown {noun} '{given}': {hint}")


def check_names(noun: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises LabError on the first name that does not exist, with the nearest ones that do."""
    for name in given:
        if name not in known:
            raise unknown(noun, name, list(known))


class Registry(Generic[T]):
    """Members by id, in the order of their `order` attribute (default 100), then of their id."""

    def __init__(self, noun: str, package: str) -> None:
        self.noun, self.package = noun, package
        self._members: dict[str, T] = {}
        self._scanned = False

    def register(self, member: T) -> T:
        """Add a member. Raises ValueError when its id is taken."""
        if member.id in self._members:
            raise ValueError(f"{self.noun} '{member.id}' is registered twice")
        self._members[member.id] = member
        return member

    def _scan(self) -> dict[str, T]:
        if not self._scanned:
            self._scanned = True
            package = importlib.import_module(self.package)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"):
                importlib.import_module(f"{self.package}.{module}")
            ordered = sorted(self._members.values(), key=lambda m: (getattr(m, "order", 100), m.id))
            self._members = {m.id: m for m in ordered}
        return self._members

    def __getitem__(self, id: str) -> T:
        members = self._scan()
        if id not in members:
            raise unknown(self.noun, id, list(members))
        return members[id]

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._scan().values()))

    def __contains__(self, id: str) -> bool:
        return id in self._scan()

    def __len__(self) -> int:
        return len(self._scan())

    def ids(self) -> list[str]:
        return list(self._scan())

    def where(self, test: Callable[[T], bool]) -> list[T]:
        return [m for m in self if test(m)]
