"""`python -m lab.peft_code`: PEFT configurations as Python code, without importing PEFT.

Reads `[[[method id, settings], …], target modules, remarks]` as JSON. A method's `config` imports its configuration class
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
        self.name, self.arguments, self.noted = name, arguments, {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("name", "arguments", "noted"):
            super().__setattr__(name, value)
        else:
            self.noted[name] = value

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


def render(wanted: list[Any], targets: Any, said: list[str]) -> str:
    """Code of every wanted configuration, with its imports, under remarks."""
    from lab.methods import METHODS
    from lab.methods.builtin import PeftMethod
    from lab.methods.own import OwnMethod

    imports: dict[str, set[str]] = {}
    bodies = []
    for id, settings in wanted:
        method = METHODS[id]
        variable = id.replace("-", "_")
        if isinstance(method, OwnMethod):
            name = f"{method.peft_name.capitalize()}Config"
            imports.setdefault("lab.methods", set()).add(name)
            bodies.append(f"{variable} = {Recorded(name, {**settings, 'target_modules': targets}).code()}\n")
            continue
        recorded: Any = method.config(method.knobs.parse(settings), targets, 0)
        _note(recorded, imports)
        noted = "".join(f"{variable}.{k} = {v!r}  # the lab's trainer reads it\n" for k, v in recorded.noted.items())
        if getattr(type(method), "finish", PeftMethod.finish) is not PeftMethod.finish:
            noted += (
                f"# freeze lora_A after get_peft_model, as lab.methods.METHODS[{id!r}].attach does: it is not trained\n"
            )
        bodies.append(f"{variable} = {_code(recorded)}\n{noted}")
    head = "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(imports.items()))
    remarks = "".join(f"# {line}\n" for line in said)
    return f"{remarks}{head}\n{chr(10).join(bodies)}"


def _note(recorded: Recorded, imports: dict[str, set[str]]) -> None:
    imports.setdefault("peft", set()).add(recorded.name)
    for value in recorded.arguments.values():
        if isinstance(value, Recorded):
            _note(value, imports)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Recorder())
    sys.stdout.write(render(*json.load(sys.stdin)))
