"""Several adapters as one LoRA: a weighted sum of their updates, whatever methods they are of.

    python -m lab merge a.safetensors runs/nora-s0/adapter --weights 0.5,0.5 --how concat --out both
    python -m lab merge a b c --how ties --density 0.3 --rank 32 --out all

concat: exact, of the ranks' sum. svd: the sum's best approximation of one rank. ties, dare: PEFT's, on whole updates.
OUT is then a PEFT LoRA folder: `lab export OUT --to kohya FILE` writes it in other layouts.
"""

from __future__ import annotations

import argparse
from typing import Any

NAME = "merge"
HELP = "several adapters as one: weighted sum, TIES or DARE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders, .safetensors files or zips")
    parser.add_argument("--weights", metavar="W,W,…", help="one for each (default: equal shares of 1)")
    parser.add_argument("--how", default="concat", choices=("concat", "svd", "ties", "dare"), help="(default concat)")
    parser.add_argument("--rank", type=int, help="of the truncated SVD (default: the largest of theirs)")
    parser.add_argument("--density", type=float, default=0.5, help="share of entries ties and dare keep (default 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops (default 0)")
    parser.add_argument("--base", help="base model that they are laid on; default: the one they name, if at hand")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from lab import merge as merging
    from lab.cli import progress
    from lab.errors import LabError

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise LabError(f"{out} is not empty: choose another folder.")
    try:
        weights = [float(w) for w in args.weights.split(",")] if args.weights else None
    except ValueError:
        raise LabError(f"--weights takes numbers between commas, as 0.5,0.5, got '{args.weights}'.") from None
    options: dict[str, Any] = {"rank": args.rank, "density": args.density, "seed": args.seed, "report": progress}
    return merging.merge_files(args.adapters, weights, args.how, out, base=args.base, **options)


def show(result: dict[str, Any]) -> None:
    for adapter in result["adapters"]:
        print(f"{adapter['weight']:g} × {adapter['name']} ({adapter['kind']}, {adapter['parameters']:,} parameters)")
    print(f"{result['how']}: rank {result['rank']}, {result['parameters']:,} parameters, {result['bytes']:,} bytes")
    print(
        f"relative error {result['relative_error']:.2g}"
        + (" (exact but for rounding)" if result["relative_error"] < 1e-6 else "")
    )
    if result["how"] in ("ties", "dare"):
        print(f"distance from the plain weighted sum {result['from_sum']:.3g}")
    print(result["adapter"])
