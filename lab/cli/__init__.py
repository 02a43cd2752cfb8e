"""The command line. ADD A COMMAND: one file in this folder with

    NAME = "budget"                      the word after `python -m lab`
    HELP = "one line"
    def add_arguments(parser) -> None    argparse
    def run(args) -> object              the result, JSON-able; prints nothing on standard output
    def show(result) -> None             prints the result for people

A command file imports nothing heavy at its top: all of them are imported on every call.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from lab import __version__
from lab.errors import LabError


def commands() -> dict[str, ModuleType]:
    """Every command module by name."""
    modules = (
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"
    )
    return {module.NAME: module for module in sorted(modules, key=lambda m: m.NAME)}


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line on standard error, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="python -m lab", description="Which compact adapter is best for my data, at my budget?")
    top.add_argument("--version", action="version", version=f"NoRA Lab {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in commands().items():
        sub = subparsers.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.add_argument(
            "--json", action="store_true", help="print the result as JSON, and nothing else, on standard output"
        )
        sub.set_defaults(module=module)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: it failed; 2: bad input; 130: interrupted."""
    args = parser().parse_args(argv)
    try:
        result = args.module.run(args)
        if args.json:
            json.dump(result, sys.stdout, indent=2, allow_nan=False)
            print(flush=True)
        else:
            args.module.show(result)
    except LabError as error:
        print(f"lab {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lab {args.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def parse_settings(pairs: Sequence[str]) -> dict[str, dict[str, str]]:
    """`["nora.r_inner=4", "k=8"]` → `{"nora": {"r_inner": "4"}, "": {"k": "8"}}`. Raises LabError on other spellings."""
    settings: dict[str, dict[str, str]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        method, _, knob = name.strip().rpartition(".")
        if not equals or not knob:
            raise LabError(f"--set takes setting=value or method.setting=value, got '{pair}'.")
        settings.setdefault(method, {})[knob] = value.strip()
    return settings


def parse_numbers(text: str, what: str) -> list[int]:
    """`"0,1,2"` → `[0, 1, 2]`. Raises LabError naming `what` on anything else."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise LabError(f"{what} takes whole numbers between commas, as 0,1,2, got '{text}'.")
    return numbers


def progress(done: int, total: int, phase: str = "") -> None:
    """A task's `report` for a person who waits at a terminal: one line on standard error, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{phase} {done} of {total}\033[K", end="", file=sys.stderr, flush=True)
