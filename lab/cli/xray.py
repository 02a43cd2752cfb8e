"""What a trained adapter does to each layer: norm, effective rank, spectrum, and its place in the base's weights.

    python -m lab xray runs/nora-s0/adapter
    python -m lab xray fox.safetensors --base sdxl --json
    python -m lab xray lora-s0/adapter --with lora-s1/adapter --with nora-s0/adapter      overlap, principal angles

ADAPTER: a PEFT folder, a .safetensors file (diffusers, kohya, LyCORIS: LoRA, LoHa, LoKr, DoRA) or a zip of one. Pickles
(.bin, .pt, .ckpt) are refused. effective rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

NAME = "xray"
HELP = "what a trained adapter does to each layer; overlap of several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, .safetensors file or zip")
    parser.add_argument("--base", help="base model that it is laid on; default: the one it names, if at hand")
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="ADAPTER", help="overlap with it")
    parser.add_argument("--no-base", action="store_true", help="leave out the comparison with the base's weights")
    parser.add_argument("--top", type=int, default=12, help="layers in the printed table (default 12)")
    parser.add_argument("--csv", metavar="FILE", help="also write all layers as a table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from lab.adapter_files import read
    from lab.errors import LabError
    from lab.files import write_atomic
    from lab.xray import report

    if args.top < 1:
        raise LabError(f"--top must be at least 1, got {args.top}.")
    file = read(args.adapter, args.base)
    result = report.analyse(file, against_base=file.base is not None and not args.no_base, tell=_progress)
    if args.others:
        others = [read(other, args.base or file.base) for other in args.others]
        result["overlap"] = report.compare([file, *others], tell=_progress)
    if args.csv:
        write_atomic(Path(args.csv), report.as_csv(result))
    result["top"] = args.top
    return result


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done + 1} of {total} layers ", end="\n" if done + 1 == total else "", file=sys.stderr)


def show(result: dict[str, Any]) -> None:
    low, high = result["rank"]
    rank = f"rank {high}" if low == high else f"rank {low} to {high}"
    base = result["base_name"] or result["family"] or "unknown base"
    print(f"{result['name']}: {', '.join(result['kinds'])}, {rank}, {result['format']} layout, {base}")
    print(f"{result['count']} layers, {result['parameters']:,} parameters, ‖ΔW‖ = {result['norm']:.4g}")
    print(f"median effective rank {result['effective_rank']:.2f}, stable rank {result['stable_rank']:.2f}")
    for note in result["notes"]:
        print(note)
    print(f"\n{'layer':<62} {'‖ΔW‖':>9} {'energy':>7} {'eff. rank':>9} {'top 10 %':>9} {'intruders':>9}")
    for row in sorted(result["layers"], key=lambda row: -row["norm"])[: result["top"]]:
        found = row.get("subspace")
        beside = f"{found['outputs']:>8.1%} {row['intruders']['intruders']:>9}" if found else ""
        name = row["layer"] if len(row["layer"]) <= 62 else "…" + row["layer"][-61:]
        print(f"{name:<62} {row['norm']:>9.4g} {row['energy']:>7.1%} {row['effective_rank']:>9.2f}  {beside}")
    if "overlap" in result:
        _show_overlap(result["overlap"])


def _show_overlap(overlap: dict[str, Any]) -> None:
    print("\noverlap φ of output directions, of input directions (by chance), cosine of the updates")
    for pair in overlap["pairs"]:
        names = f"{overlap['names'][pair['a']]} and {overlap['names'][pair['b']]}"
        print(
            f"{names}: {pair['outputs']:.3f} ({pair['outputs_chance']:.3f}), {pair['inputs']:.3f} "
            f"({pair['inputs_chance']:.3f}), {pair['cosine']:+.3f}"
        )
