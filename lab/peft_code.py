"""`python -m lab.peft_code`: PEFT configurations as Python code, without importing PEFT.

Reads `[[[method id, settings], …], target modules]` as JSON. A method's `config` imports its configuration class
from `peft`; here `peft` is a recorder whose classes keep what they were called with. A process of its own, so that
the recorder is nobody else's `peft`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from typing import Any


class Recorded:
    """A call of a class of PEFT's, printed as code."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name, self.arguments = name, arguments

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("name", "arguments"):
            super().__setattr__(name, value)
        else:
            self.arguments[name] = value

    def code(self, depth: int = 0) -> str:
        inner = "    " * (depth + 1)
        lines = [f"{inner}{k}={_code(v, depth + 1)},\n" for k, v in self.arguments.items() if v is not None]
        return f"{self.name}(\n{''.join(lines)}{'    ' * depth})"


def _code(value: Any, depth: int = 0) -> str:
    return value.code(depth) if isinstance(value, Recorded) else repr(value)


class _Recorder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for `peft` and everything below it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname == "peft" or fullname.startswith("peft."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda **arguments: Recorded(name, arguments)

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        return


def render(wanted: list[Any], targets: Any) -> str:
    """Code of every wanted configuration, with its imports."""
    from lab import methods
    from lab.methods import METHODS
    from lab.methods.own import OwnMethod

    imports: dict[str, set[str]] = {}
    bodies = []
    for id, settings in wanted:
        method = METHODS[id]
        variable = id.replace("-", "_")
        if isinstance(method, OwnMethod):
            name = f"{method.peft_name.capitalize()}Config"
            public = next((n for n in methods.__all__ if n.lower() == name.lower()), "")
            arguments = {**settings, "target_modules": targets}
            if public:
                imports.setdefault("lab.methods", set()).add(public)
                bodies.append(f"{variable} = {Recorded(public, arguments).code()}\n")
            else:
                imports.setdefault("lab.methods", set()).add("METHODS")
                knobs = Recorded(f'METHODS["{id}"].knobs', dict(settings)).code(1)
                bodies.append(
                    f'{variable} = METHODS["{id}"].config(\n    {knobs},\n    targets={targets!r},\n    seed=0,\n)\n'
                )
            continue
        recorded: Any = method.config(method.knobs.parse(settings), targets, 0)
        _note(recorded, imports)
        bodies.append(f"{variable} = {_code(recorded)}\n")
    head = "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(imports.items()))
    return f"{head}\n{chr(10).join(bodies)}"


def _note(recorded: Recorded, imports: dict[str, set[str]]) -> None:
    imports.setdefault("peft", set()).add(recorded.name)
    for value in recorded.arguments.values():
        if isinstance(value, Recorded):
            _note(value, imports)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Recorder())
    sys.stdout.write(render(*json.load(sys.stdin)))
