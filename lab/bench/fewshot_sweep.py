"""Learning rates of the few-shot task's short preset: validation accuracy by method and rate, test pictures unseen.

    python -m lab bench fewshot_sweep --method lora --rates 3e-3,1e-2 --shots 16

Means over `--seeds`, which no reported table uses; validated on eight other training pictures a class.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

HELP = "few-shot learning rates, by validation pictures"
VALIDATION = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", action="append", required=True, metavar="ID")
    parser.add_argument("--rates", required=True, metavar="A,B", help="learning rates between commas")
    parser.add_argument("--shots", type=int, default=4, metavar="N", help="training pictures a class")
    parser.add_argument("--seeds", default="101", metavar="A,B", help="seeds of the shots, between commas")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps instead of the preset's")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures a step instead of the preset's")
    parser.add_argument("--base", default="tiny-clip", metavar="NAME")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    import dataclasses
    import time
    from statistics import fmean

    from lab.cli import parse_numbers
    from lab.tasks import TASKS, _fewshot_run
    from lab.tasks.fewshot import recipe

    spec = {"methods": args.method, "base": args.base, "preset": "short", "shots": [args.shots], "steps": args.steps}
    spec = TASKS["fewshot"].check(spec | {"batch": args.batch})
    drawn = [_episode(spec, args.shots, seed) for seed in parse_numbers(args.seeds, "--seeds")]
    rows = []
    for id in args.method:
        for rate in map(float, args.rates.split(",")):
            method, plan = _fewshot_run.runner(id), dataclasses.replace(recipe(spec, id), rates=(rate,))
            began = time.perf_counter()
            runs = [_fit(method, episode, method.knobs.parse(spec["methods"][id]), plan) for episode in drawn]
            best, last, step = (round(fmean(values), 4) for values in zip(*runs, strict=True))
            row = {"method": id, "rate": rate, "accuracy": best, "last": last, "best_step": round(step)}
            row["seconds"] = round((time.perf_counter() - began) / len(runs), 1)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _episode(spec: dict[str, Any], shots: int, seed: int) -> Any:
    """One with VALIDATION validation pictures a class, whatever the shots. The shared draw is cut on a copy."""
    import dataclasses
    from unittest import mock

    from lab.clip import protocol
    from lab.tasks import _fewshot_run

    draw = max(shots, VALIDATION)
    with mock.patch.object(protocol, "VALIDATION", VALIDATION):
        drawn = dataclasses.replace(_fewshot_run.episode(spec, draw, seed))
    labels = drawn.train.labels
    keep = [i for i in range(len(labels)) if i % draw < shots]
    drawn.train = dataclasses.replace(drawn.train, pixels=drawn.train.pixels[keep], labels=labels[keep])
    drawn.shots = shots
    return drawn


def _fit(method: Any, episode: Any, knobs: Any, plan: Any) -> tuple[float, float, int]:
    """Validation accuracy at the best step and at the last, and the best step."""
    import tempfile
    from pathlib import Path

    from lab.clip.fit import fit

    curve: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(method, episode, knobs, plan, Path(folder), _silent, lambda **v: curve.append(v["accuracy"]))
    return fitted.validation_accuracy, curve[-1], fitted.step


def _silent(*_args: Any, **_values: Any) -> None:
    pass


def show(result: list[dict[str, Any]]) -> None:
    for row in result:
        print(
            f"{row['method']:<16}{row['rate']:<10g}{row['accuracy']:.3f} (last {row['last']:.3f}) step {row['best_step']}"
        )
