"""Which updates a method reaches on one d×d layer: NOLA's Figure 2 for any method, measured and in closed form.

    python -m lab coverage --d 16 --method nola --params 8,16,32
    python -m lab coverage --d 16 --method nola --method pranc --method nora --params 8,16,32,64
    python -m lab coverage --d 16 --method lora --params 64 --target full
    python -m lab coverage --d 32 --method nora --method lora --target real

rank is the dimension of the span of random updates, coverage its share of d². Settings for a number of parameters come
from the method's own solver; where they leave a choice, the widest span is taken. closed_form is a share of d² too.
"""

from __future__ import annotations

import argparse
from typing import Any

from lab.cli import parse_numbers, parse_settings
from lab.errors import LabError

NAME = "coverage"
HELP = "the updates that methods reach: span, degrees of freedom, approximation"
METHODS_SHOWN = ("nola", "pranc", "nora", "lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", default="16", metavar="D", help="side of the layer, 2 to 64 (default 16)")
    parser.add_argument(
        "--method",
        action="append",
        metavar="ID",
        help=f"a method's id; again for more (default {', '.join(METHODS_SHOWN)})",
    )
    parser.add_argument("--params", metavar="N,N,…", help="numbers of parameters (default: d/2 to d², in doublings)")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KNOB=VALUE", help="hold a setting")
    parser.add_argument("--seed", default="0", metavar="N", help="seed of bases and samples (default 0)")
    parser.add_argument(
        "--with-start",
        action="store_true",
        help="NOLA with the frozen A₀ of its authors' code, not the paper's equation",
    )
    parser.add_argument(
        "--target",
        choices=("full", "low", "real"),
        help="fit a target instead, random or a real fine-tuning difference: the best reachable error",
    )
    parser.add_argument("--spectra", action="store_true", help="the singular values behind each number, in the result")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a method and number of parameters: method, d, params, rank, coverage, closed_form, and what explains them."""
    from lab import coverage
    from lab.coverage import curves
    from lab.methods import METHODS

    d = curves.layer(args.d).m
    counts = curves.check_counts(parse_numbers(args.params, "--params") if args.params else doublings(d), d)
    (seed,) = parse_numbers(args.seed, "--seed")[:1]
    if not 0 <= seed < 2**32:
        raise LabError(f"--seed is a whole number from 0 to 4294967295, got {args.seed}.")
    ids = [id for given in args.method or METHODS_SHOWN for id in str(given).split(",") if id]
    chosen = list(dict.fromkeys(METHODS[id].id for id in ids))
    given = parse_settings(args.set)
    if strange := sorted(set(given) - {"", *chosen}):
        raise LabError(f"--set names {', '.join(strange)}, but the methods are {', '.join(chosen)}.")
    if "" in given and len(chosen) > 1:
        raise LabError("With several methods --set takes method.setting=value.")
    found = []
    for id in chosen:
        held = METHODS[id].knobs.parse({**given.get("", {}), **given.get(id, {})})
        named = {k: getattr(held, k) for k in {**given.get("", {}), **given.get(id, {})}}
        options = {"start": args.with_start, "target": args.target or "", "spectra": args.spectra}
        found += coverage.curve(id, d, counts, seed=seed, given=named, **options)
    return found if args.spectra else [curves.plain(record) for record in found]


def doublings(d: int) -> list[int]:
    """d/2, d, 2d, … and d²."""
    found = [max(1, d // 2)]
    while found[-1] * 2 < d * d:
        found.append(found[-1] * 2)
    return [*found, d * d]


def show(result: list[dict[str, Any]]) -> None:
    fitted = any("error" in row for row in result)
    head = f"{'method':<16}{'n':>7}{'used':>7}"
    if fitted:
        print(head + f"{'error':>10}  how")
        for row in result:
            error = "–" if row.get("error") is None else f"{row['error']:.4f}"
            print(
                f"{row['method']:<16}{row['params']:>7}{row['trainable_parameters']:>7}{error:>10}  {row['fitted_by']}"
            )
        return
    print(f"d = {result[0]['d']}, d² = {result[0]['d'] ** 2}")
    print(head + f"{'span':>8}{'coverage':>10}{'closed':>9}{'local':>8}{'rank':>6}  settings")
    for row in result:
        closed = "–" if row["closed_form"] is None else f"{row['closed_form']:.4f}"
        local = "–" if row["local_dimension"] is None else row["local_dimension"]
        knobs = ", ".join(
            f"{k}={v:g}" for k, v in row["knobs"].items() if isinstance(v, (int, float)) and v is not True
        )
        print(
            f"{row['method']:<16}{row['params']:>7}{row['trainable_parameters']:>7}{row['rank']:>8}{row['coverage']:>10.4f}"
            f"{closed:>9}{local:>8}{row['update_rank']:>6}  {knobs}{'' if row['clear'] else '  (near the tolerance)'}"
        )
