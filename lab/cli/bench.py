"""Performance, measured here and now, as ratios within one run.

Each benchmark is a file in lab/bench with HELP, add_arguments(parser), run(args) and show(result).
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import lab.bench

NAME = "bench"
HELP = "measure the lab against LoRA, PEFT and the plain formulas"


def benchmarks() -> dict[str, ModuleType]:
    """Every benchmark module by name."""
    names = (m.name for m in pkgutil.iter_modules(lab.bench.__path__) if m.name[0] != "_")
    return {name: importlib.import_module(f"lab.bench.{name}") for name in names}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in benchmarks().items():
        sub = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        sub.set_defaults(bench=module)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return {"benchmark": args.benchmark, "result": args.bench.run(args)}


def show(result: dict[str, Any]) -> None:
    importlib.import_module(f"lab.bench.{result['benchmark']}").show(result["result"])
