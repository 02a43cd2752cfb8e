"""The whole few-shot table with the embedded model and dataset: every method of NoRA's Table 2 and its baselines, at 4 and
16 shots, three seeds, on two cores.

    python -m lab bench fewshot_table --write

Resumable: what is done in --out is not done again. `--only` reports what is there. CPU seconds are counted a run, so that
other programs on the machine do not count; two processes of one thread each then take about half of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HELP = "the few-shot table on the embedded model: accuracies, verdicts, CPU seconds"
PAGE = Path(__file__).with_name("fewshot.md")
HEAD = "# Few-shot, measured\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs are kept (default: under LAB_HOME)")
    parser.add_argument("--shots", default="4,16", metavar="A,B")
    parser.add_argument("--seeds", default="4,5,6", metavar="A,B")
    parser.add_argument("--method", action="append", metavar="ID", help="instead of the whole table")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="runs done at once (default 2)")
    parser.add_argument("--only", action="store_true", help="compute nothing, report what is there")
    parser.add_argument("--write", action="store_true", help="write the table into lab/bench/fewshot.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lab import comparison
    from lab.bench import _tables
    from lab.cli import parse_numbers
    from lab.cli.fewshot import TABLE
    from lab.cli.subject import progress
    from lab.clip import table
    from lab.runs import default_home
    from lab.tasks import TASKS

    task = TASKS["fewshot"]
    spec = {"methods": args.method or list(TABLE), "shots": parse_numbers(args.shots, "--shots")}
    spec = task.check(spec | {"seeds": parse_numbers(args.seeds, "--seeds")})
    out = args.out or default_home() / "bench" / "fewshot-table"
    began = time.perf_counter()
    if not args.only:
        spec = comparison.start(out, "fewshot", spec, [])
        for run in comparison.run_all(out, "fewshot", spec, progress, args.processes):
            if run["state"] != "done":
                print(f"{run['method']} seed {run['seed']}: {run['message']}", file=sys.stderr)
    results = [out / "runs" / comparison.run_name(planned) / "result.json" for planned in task.plan(spec)]
    found = table.records({"result": json.loads(path.read_text())} for path in results if path.exists())
    made = report(found) | {"wall_seconds": round(time.perf_counter() - began), "preset": spec["preset"]}
    made["missing"] = len(results) * len(spec["shots"]) - made["runs"]
    if args.write:
        _tables.write(PAGE, "table", "\n".join(lines(made)), HEAD)
    return made


def report(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of finished runs → {"rows": one a method, "runs", "cpu_seconds"}; a verdict is True only beyond the noise
    (`lab.clip.table.above`). "together": the row of all adapters' mean, where there are several."""
    from lab.clip import table

    heads, rows, pooled = table.columns(found), table.rows(found), _pooled(found)
    zero = next((row["cells"] for row in rows if row["method"] == "zero-shot"), {})
    made = [_row(row, [r for r in found if r["method"] == row["method"]], heads, zero) for row in rows]
    together = [_row(row, pooled, heads, zero) for row in table.rows(pooled)]
    total = sum(r["cpu_seconds"] for r in found)
    return {"heads": heads, "rows": made, "together": together, "runs": len(found), "cpu_seconds": round(total)}


def _pooled(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record for each number of shots and seed: the mean over all adapters, as if they were one method. A seed's adapters
    learn from the same pictures, so that only seeds are counted as repetitions. Of runs that are all there."""
    from lab.methods import METHODS

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in found:
        if record["method"] in METHODS or record["method"] == "clip-lora":
            groups.setdefault((record["dataset"], record["shots"], record["seed"]), []).append(record)
    most = max(map(len, groups.values()), default=0)
    means = ("accuracy", "trainable_parameters", "cpu_seconds")
    return [
        group[0]
        | {"method": "adapters", "name": f"All {most} adapters, mean"}
        | {key: sum(record[key] for record in group) / most for key in means}
        for group in groups.values()
        if len(group) == most > 1
    ]


def _row(row: dict[str, Any], own: list[dict[str, Any]], heads: list[Any], zero: dict[Any, Any]) -> dict[str, Any]:
    from lab.clip import table

    cells = row["cells"]
    most, least = max(cells, key=lambda key: key[1]), min(cells, key=lambda key: key[1])
    return {
        "method": row["method"],
        "name": row["name"],
        "trainable_parameters": round(row["trainable_parameters"]),
        "cells": [table.cell(cells.get(key), "**", "**", "<u>", "</u>") for key in heads],
        "above_zero_shot": [
            key in cells and key in zero and table.above(cells[key]["values"], zero[key]["values"]) for key in heads
        ],
        "more_shots_better": most != least and table.above(cells[most]["values"], cells[least]["values"]),
        "seconds": round(sum(r["cpu_seconds"] for r in own) / len(own), 1),
    }


def lines(made: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    shots = [k for _, k in made["heads"]]
    head = ["Method", "Parameters", *(f"{k} shots" for k in shots), *(f"above zero-shot at {k}" for k in shots)]
    head += [f"{shots[-1]} above {shots[0]}", "CPU s a run"]
    body = []
    for row in (*made["rows"], *made["together"]):
        verdicts = ["yes" if it else "no" for it in (*row["above_zero_shot"], row["more_shots_better"])]
        verdicts = ["", "", ""] if row["method"] == "zero-shot" else verdicts
        cells = [row["name"], f"{row['trainable_parameters']:,}", *row["cells"], *verdicts, f"{row['seconds']:.1f}"]
        body.append(f"| {' | '.join(cells)} |")
    missing = made.get("missing", 0)
    idle = "" if missing else f": about {made['cpu_seconds'] / 120:.0f} minutes on two idle cores"
    return [
        "## The whole table on two processor cores",
        "",
        *([f"**Not complete: {missing} runs are missing.**", ""] if missing else []),
        f"`python -m lab bench fewshot_table --write`: tiny-clip, the embedded OpenMoji set (12 classes, 240 test pictures), "
        f"preset {made['preset']}, {made['runs']} runs, {made['cpu_seconds']} CPU seconds in all, by processes of one thread{idle}.",
        "",
        "Top-1 accuracy in per cent, mean ± standard deviation over seeds; bold the best and underlined the second where the"
        " lead is larger than the noise; above: beyond the noise (Welch's t-test, one-sided, 5 %).",
        "",
        f"| {' | '.join(head)} |",
        f"|-|{'-:|' * (len(head) - 1)}",
        *body,
    ]


def show(result: dict[str, Any]) -> None:
    print("\n".join(lines(result)))
