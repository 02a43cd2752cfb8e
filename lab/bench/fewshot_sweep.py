"""Learning rates of the few-shot task's short preset: validation accuracy by method and rate, test pictures unseen.

    python -m lab bench fewshot_sweep --method lora --rates 3e-3,1e-2 --shots 16

Shots of seed 101, which no reported table uses; validated on eight other training pictures a class.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

HELP = "few-shot learning rates, by validation pictures"
SEED, VALIDATION = 101, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", action="append", required=True, metavar="ID")
    parser.add_argument("--rates", required=True, metavar="A,B", help="learning rates between commas")
    parser.add_argument("--shots", type=int, default=4, metavar="N", help="training pictures a class")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps instead of the preset's")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures a step instead of the preset's")
    parser.add_argument("--base", default="tiny-clip", metavar="NAME")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    import dataclasses
    import tempfile
    import time
    from pathlib import Path
    from unittest import mock

    from lab.clip import fit as fitting
    from lab.clip import protocol
    from lab.tasks import TASKS, _fewshot_run
    from lab.tasks.fewshot import recipe

    rates = [float(rate) for rate in args.rates.split(",")]
    shots = args.shots
    spec = {"methods": args.method, "base": args.base, "preset": "short", "shots": [shots], "steps": args.steps}
    spec |= {"batch": args.batch}
    spec = TASKS["fewshot"].check(spec)
    rows = []
    with mock.patch.object(protocol, "VALIDATION", VALIDATION):
        # Validation pictures are min(shots, VALIDATION) a class. The draw is shared: it is cut on a copy.
        draw = max(shots, VALIDATION)
        drawn = dataclasses.replace(_fewshot_run.episode(spec, draw, SEED))
        labels = drawn.train.labels
        keep = [i for i in range(len(labels)) if i % draw < shots]
        drawn.train = dataclasses.replace(drawn.train, pixels=drawn.train.pixels[keep], labels=labels[keep])
        drawn.shots = shots
    for id in args.method:
        for rate in rates:
            method, plan = _fewshot_run.runner(id), dataclasses.replace(recipe(spec, id), rates=(rate,))
            knobs = method.knobs.parse(spec["methods"][id])
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                curve: list[float] = []
                fitted = fitting.fit(
                    method,
                    drawn,
                    knobs,
                    plan,
                    Path(folder),
                    _silent,
                    lambda curve=curve, **v: curve.append(v["accuracy"]),
                )
            row = {
                "method": id,
                "rate": rate,
                "accuracy": round(fitted.validation_accuracy, 4),
                "last": round(curve[-1], 4),
            }
            row |= {"best_step": fitted.step, "seconds": round(time.perf_counter() - began, 1)}
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _silent(*_args: Any, **_values: Any) -> None:
    pass


def show(result: list[dict[str, Any]]) -> None:
    for row in result:
        print(
            f"{row['method']:<16}{row['rate']:<10g}{row['accuracy']:.3f} (last {row['last']:.3f}) step {row['best_step']}"
        )
