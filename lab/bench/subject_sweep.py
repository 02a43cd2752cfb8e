"""Learning rates, ranks and steps of the subject task's presets, searched and then checked.

    python -m lab bench subject_sweep search      which learning rate and how many steps: lab/bench/subject_search.csv
    python -m lab bench subject_sweep presets     the presets on every example subject: lab/bench/subject_presets.csv

Rows are appended as they are measured and not measured twice for the same weights of the base. The presets
themselves stand in the base's file (lab/bases/tiny_sdxl.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HELP = "search and check the subject task's presets on the embedded base"
HERE = Path(__file__).parent
SEARCHED = {  # method: settings, learning rates
    "lora": [({"r": 4}, (2e-3, 4e-3, 1e-3))],
    "nora": [({"r_outer": 0.5, "r_inner": 4}, (3e-3, 6e-3, 1.5e-3))],
}
PROBED = (100, 150, 200, 300)  # steps at which a search run is scored
FIELDS = (
    *("weights", "subject", "method", "knobs", "lr", "seed", "steps", "trainable_parameters"),
    *("clip_i", "clip_t", "base_clip_i", "base_clip_t", "seconds"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=("search", "presets"))
    parser.add_argument("--base", default="tiny-sdxl")
    parser.add_argument("--subjects", default="", help="names between commas (search: fox,rocket; presets: all)")
    parser.add_argument("--methods", default="lora,nora")
    parser.add_argument("--out", type=Path, help="keep the presets' grids and reports in this folder")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from lab.bases import ASSETS

    every = sorted(path.parent.name for path in (ASSETS / "subjects").glob("*/subject.json"))
    subjects = [s for s in args.subjects.split(",") if s] or (["fox", "rocket"] if args.stage == "search" else every)
    methods = args.methods.split(",")
    return (
        search(args.base, subjects, methods)
        if args.stage == "search"
        else presets(args.base, subjects, methods, args.out)
    )


# -- search --------------------------------------------------------------------------------------------
def search(base: str, subjects: Sequence[str], methods: Sequence[str]) -> list[dict[str, Any]]:
    """One run a subject, method, setting and learning rate, scored along the way. All rows of these weights."""
    sheet = _Sheet(HERE / "subject_search.csv", _weights(base))
    for subject in subjects:
        untouched: dict[str, float] = {}
        for method in methods:
            for knobs, rates in SEARCHED[method]:
                for lr in rates:
                    key = {"subject": subject, "method": method, "knobs": json.dumps(knobs), "lr": lr, "seed": 0}
                    if sheet.find(key):
                        continue
                    untouched = untouched or _score_base(base, subject)
                    print(f"{subject}: {method} {knobs} lr {lr:g}", file=sys.stderr, flush=True)
                    for row in _probe(base, subject, method, knobs, lr):
                        sheet.add(key | row | untouched)
    return sheet.rows


def _spec(base: str, subject: str, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """The checked spec of an example subject with the presets, and its pictures."""
    from lab.bases import ASSETS
    from lab.cli.subject import captions, find
    from lab.tasks import TASKS
    from lab.uploads import decode_all

    paths, card = find([str(ASSETS / "subjects" / subject)])
    spec = {"base": base, "class_word": card["class_word"], "captions": captions(paths), "pictures": len(paths)}
    return TASKS["subject"].check(spec | changes), decode_all(paths)


def _score_base(base: str, subject: str) -> dict[str, float]:
    from lab.tasks import PlannedRun
    from lab.tasks._subject_run import Run

    spec, pictures = _spec(base, subject, unrelated_prompts=[])
    with tempfile.TemporaryDirectory() as folder:
        result = Run(spec, PlannedRun("base", 0), pictures, Path(folder), Path(folder), _silent).draw_and_score()
    return {"base_clip_i": result["clip_i"], "base_clip_t": result["clip_t"]}


def _probe(base: str, subject: str, method: str, knobs: dict[str, Any], lr: float) -> Iterator[dict[str, Any]]:
    """Train to the last of the probed steps; a row for each of them."""
    from lab.errors import LabError
    from lab.tasks import PlannedRun
    from lab.tasks._subject_run import Run

    found: list[dict[str, Any]] = []

    class Probe(Run):
        def _preview(self, step: int) -> None:
            if step in PROBED:
                scored = self.draw_and_score()
                found.append({"steps": step, "clip_i": scored["clip_i"], "clip_t": scored["clip_t"]})

    changes = {"steps": PROBED[-1], "preview_every": 50, "checkpoint_every": PROBED[-1], "unrelated_prompts": []}
    spec, pictures = _spec(base, subject, methods={method: knobs}, lr={method: lr}, seeds=[0], **changes)
    with tempfile.TemporaryDirectory() as folder:
        planned = PlannedRun(method, 0, spec["methods"][method])
        try:
            result = Probe(spec, planned, pictures, Path(folder), Path(folder), _silent).train_and_score()
        except LabError as error:  # a learning rate that diverges is a finding
            print(error, file=sys.stderr)
            return
    for row in found:
        seconds = result["train_seconds"] * row["steps"] / PROBED[-1]
        yield row | {"trainable_parameters": result["trainable_parameters"], "seconds": seconds}


def _silent(*_: Any, **__: Any) -> None:
    pass


# -- presets -------------------------------------------------------------------------------------------
def presets(base: str, subjects: Sequence[str], methods: Sequence[str], out: Path | None) -> list[dict[str, Any]]:
    """The default comparison on each subject; the rows of its runs. Grids go to `out/<weights>/<subject>`."""
    from lab import compare, comparison

    sheet, asked = _Sheet(HERE / "subject_presets.csv", _weights(base)), []
    for subject in subjects:
        spec, pictures = _spec(base, subject, methods=list(methods))
        wanted = [
            {
                "subject": subject,
                "method": m,
                "knobs": json.dumps(spec["methods"][m]),
                "lr": spec["lr"][m],
                "seed": s,
                "steps": spec["steps"],
            }
            for m in methods
            for s in spec["seeds"]
        ]
        asked += wanted
        if all(sheet.find(key) for key in wanted):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = (out or Path(scratch)) / sheet.weights / subject  # other weights' runs are not to be resumed
            spec = comparison.start(folder, "subject", spec, pictures)
            runs = comparison.run_all(folder, "subject", spec, partial(_told, subject))
            compare.write_report(folder, spec, runs)
        results = {(r["method"], r["seed"]): r["result"] for r in runs}
        untouched = {f"base_{k}": results["base", 0][k] for k in ("clip_i", "clip_t")}
        for key in wanted:
            result = results[key["method"], key["seed"]]
            scores = {k: result[k] for k in ("trainable_parameters", "clip_i", "clip_t")}
            sheet.add(key | scores | untouched | {"seconds": result["train_seconds"]})
    return [row for key in asked if (row := sheet.find(key))]


def _told(subject: str, planned: Any) -> Any:
    print(f"{subject}: {planned.method} seed {planned.seed}", file=sys.stderr, flush=True)
    return _silent


# -- the sheet -----------------------------------------------------------------------------------------
def _weights(base: str) -> str:
    """What rows are kept by: scores are comparable for the same weights only."""
    from lab.bases import _prints, resolve

    return _prints.unet_digits(resolve(base))


class _Sheet:
    """A CSV that grows; `rows` are those of these weights."""

    def __init__(self, path: Path, weights: str) -> None:
        self.path, self.weights = path, weights
        with path.open(newline="") if path.exists() else tempfile.TemporaryFile("w+") as file:
            self.rows = [row for row in csv.DictReader(file) if row["weights"] == weights]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row measured last with these values."""
        same = (row for row in reversed(self.rows) if all(str(row[k]) == str(v) for k, v in key.items()))
        return next(same, None)

    def add(self, row: dict[str, Any]) -> None:
        row = {"weights": self.weights} | {
            k: round(v, 4) if k.startswith(("clip", "base", "sec")) else v for k, v in row.items()
        }
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and for the presets whether each method raises CLIP-I by more than the spread over seeds."""
    for row in rows:
        gain = float(row["clip_i"]) - float(row["base_clip_i"])
        print(
            f"{row['subject']:<10}{row['method']:<6}{row['knobs']:<36} lr {float(row['lr']):<8g}seed {row['seed']} "
            f"steps {row['steps']:<5}CLIP-I {float(row['clip_i']):.3f} ({gain:+.3f})  CLIP-T {float(row['clip_t']):.3f}"
        )
    for method in dict.fromkeys(row["method"] for row in rows):
        won = [subject for subject, gain, spread in gains(rows, method) if gain > spread]
        tried = len(list(gains(rows, method)))
        if tried:
            print(
                f"{method}: CLIP-I above the base's by more than the spread on {len(won)} of {tried}: {', '.join(won)}"
            )


def gains(rows: Sequence[dict[str, Any]], method: str) -> Iterator[tuple[str, float, float]]:
    """Subject, mean gain in CLIP-I over the base, spread over training seeds; for subjects with two seeds or more."""
    from lab.compare import mean_and_spread

    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if (row["subject"], row["method"]) == (subject, method)]
        if len({row["seed"] for row in own}) > 1:
            mean, spread = mean_and_spread([float(row["clip_i"]) for row in own])
            yield subject, (mean or 0.0) - float(own[0]["base_clip_i"]), spread or 0.0
