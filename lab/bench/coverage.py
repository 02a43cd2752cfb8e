"""Seconds a curve of the Coverage tab takes, for every method that it can draw.

    OMP_NUM_THREADS=1 python -m lab bench coverage --d 32 --write

A curve is what the page asks for: ten parameter counts up to d², measured (rank of the span, of the Jacobian, of one
update), and fitted to a target. Nothing is read from the cache. CPU seconds of one thread; importing PyTorch, which
methods without an equation of their own need once, is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

HELP = "seconds a curve of the Coverage tab takes, by method"
PAGE = Path(__file__).with_suffix(".md")
HEAD = "# Coverage, measured\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", type=int, default=32, help="rows and columns of the layer")
    parser.add_argument("--method", action="append", metavar="ID", help="these alone (repeat it); default: all")
    parser.add_argument("--target", default="full", help="what is fitted: full, low or real")
    parser.add_argument("--write", action="store_true", help=f"write the table into lab/bench/{PAGE.name}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import os
    import sys
    from unittest import mock

    import torch

    from lab.bench import _tables
    from lab.coverage import apart
    from lab.methods import METHODS

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, {"LAB_HOME": home}):
        for id in args.method or METHODS.ids():
            row = {"method": id, "own_code": apart.needed(id)} | _seconds(id, args.d, args.target)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    result = {"d": args.d, "target": args.target, "chosen": args.method or [], "curves": rows}
    if args.write:
        _tables.write(PAGE, f"d{args.d}", "\n".join(lines(result)), HEAD)
    return result


def _seconds(id: str, d: int, target: str) -> dict[str, Any]:
    """{"measured", "fitted": CPU seconds, "points": how many were fitted}, or {"error"} where there is no such curve."""
    from lab.coverage import apart, curves
    from lab.errors import LabError

    counts, own = curves.automatic(d), apart.needed(id)  # of the others the page asks for a spectrum only on a click
    try:
        curves.curve(id, d, counts[:1], spectra=own)  # what only the first point pays for
        began = time.process_time()
        curves.curve(id, d, counts, seed=1, spectra=own)
        middle = time.process_time()
        fitted = curves.curve(id, d, counts, seed=1, target=target)
    except LabError as problem:
        return {"error": str(problem)}
    end = time.process_time()
    points = sum(row.get("error") is not None for row in fitted)
    return {"measured": round(middle - began, 2), "fitted": round(end - middle, 2), "points": points}


def lines(result: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    from lab.coverage.fit import TARGETS

    made = [row for row in result["curves"] if "error" not in row]
    none = [row["method"] for row in result["curves"] if "error" in row]
    some = "".join(f" --method {id}" for id in result["chosen"])
    return [
        f"## A curve at d = {result['d']}",
        "",
        f"`OMP_NUM_THREADS=1 python -m lab bench coverage --d {result['d']}{some} --write`: ten parameter counts up to d², CPU "
        f"seconds of one thread; fitted to {TARGETS[result['target']]}. Own code: measured on the layer itself, not on an equation.",
        "",
        "| method | own code | measured, s | fitted, s | points fitted |",
        "|-|-|-:|-:|-:|",
        *(
            f"| {r['method']} | {'yes' if r['own_code'] else ''} | {r['measured']:.2f} | {r['fitted']:.2f} | {r['points']} |"
            for r in sorted(made, key=lambda row: -max(row["measured"], row["fitted"]))
        ),
        "",
        f"No change of one weight, so without a curve: {', '.join(none) or 'none'}.",
    ]


def show(result: dict[str, Any]) -> None:
    print("\n".join(lines(result)))
