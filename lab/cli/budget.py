"""How many parameters an adapter has, or which settings give it a number of parameters.

    python -m lab budget sdxl-unet lora --targets attn --set r=4
    python -m lab budget gpt2-medium nola --targets q,v --budget 96000
    python -m lab budget my/config.json vera

ARCH is an architecture of the lab, a path to a model's config.json or to a table of shapes, or owner/model on the
Hub (its config.json alone is fetched). METHOD is an id that `python -m lab methods` lists.
"""

from __future__ import annotations

import argparse
from typing import Any

from lab import architectures, budget
from lab.cli import parse_settings
from lab.errors import LabError
from lab.methods import METHODS
from lab.targets import NAMES

NAME = "budget"
HELP = "parameters of an adapter, or the settings for a number of parameters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arch", metavar="ARCH", help=f"one of {', '.join(architectures.ids())}, a path, or owner/model")
    parser.add_argument("method", metavar="METHOD", help="a method's id")
    parser.add_argument(
        "--targets", default="attn", metavar="NAMES", help=f"layers to adapt, from {', '.join(NAMES)} (default attn)"
    )
    parser.add_argument("--blocks", metavar="A-B", help="only the blocks A to B, counted from 0")
    parser.add_argument("--part", default="", metavar="TOWER", help="only one tower of a CLIP model: vision or text")
    parser.add_argument("--text-encoders", action="store_true", help="adapt the model's text encoders too")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="a setting of the method")
    parser.add_argument(
        "--budget", metavar="N", help="solve for the settings with N parameters; those given by --set stay"
    )


def parse_blocks(text: str | None) -> tuple[int, int] | None:
    """`"3-7"` → (3, 7), `"4"` → (4, 4). Raises LabError on anything else."""
    if not text:
        return None
    first, dash, last = text.partition("-")
    if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
        raise LabError(f"--blocks takes two numbers as 0-5, got '{text}'.")
    low, high = int(first), int(last or first)
    if low > high:
        raise LabError(f"--blocks starts at {low} and ends before it, at {high}.")
    return low, high


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Keys arch, method, knobs, targets, layers (how many), trainable_parameters, bytes, and what explains them."""
    arch = architectures.resolve(args.arch)
    method = METHODS[args.method]
    blocks = parse_blocks(args.blocks)
    rows = arch.select(args.targets, blocks=blocks, part=args.part)
    models = [arch]
    if args.text_encoders:
        models += [architectures.load(id) for id in arch.companions]
        if len(models) == 1:
            raise LabError(f"{arch.name} has no text encoder of its own.")
        rows = rows + [row for model in models[1:] for row in model.select(_linear(args.targets))]
    layers = architectures.shapes(rows)
    given = _settings(args.set, method.id)
    knobs = method.knobs.parse(given)
    note, miss = "", None
    if args.budget is not None:
        solution = budget.solve(method, layers, args.budget, knobs, fixed=list(given))
        knobs, note, miss = solution.knobs, solution.note, solution.miss
    budget.check(method, layers, knobs)
    total = budget.count(method, layers, knobs)
    lora = METHODS["lora"]
    floor = budget.count(lora, layers, lora.knobs.parse({"r": 1}))
    fused = arch.fused(args.targets)
    return {
        "arch": args.arch,
        "method": method.id,
        "knobs": budget.as_dict(knobs),
        "targets": [t.strip() for t in args.targets.split(",") if t.strip()],
        "layers": len(layers),
        "trainable_parameters": total,
        "bytes": budget.sizes(total),
        "model_parameters": sum(model.parameters for model in models),
        "lora_rank_1": floor,
        "budget": budget.check_budget(args.budget) if args.budget is not None else None,
        "miss": miss,
        "note": note,
        "fused": f"q, k and v are one layer here, counted {'whole' if fused == 'whole' else 'as separate layers'}"
        if fused
        else "",
    }


def _settings(pairs: list[str], method: str) -> dict[str, str]:
    by_method = parse_settings(pairs)
    other = sorted(set(by_method) - {"", method})
    if other:
        raise LabError(f"--set names {', '.join(other)}, but the method is {method}.")
    return {**by_method.get("", {}), **by_method.get(method, {})}


def _linear(targets: str) -> str:
    """The targets that a text encoder can have: no convolutions."""
    names = [t.strip() for t in targets.split(",") if t.strip() not in ("", "conv")]
    if not names:
        raise LabError("Text encoders have no convolutions: name other layers beside conv.")
    return ",".join(names)


def show(result: dict[str, Any]) -> None:
    share = result["trainable_parameters"] / result["model_parameters"]
    knobs = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in result["knobs"].items())
    print(f"{result['method']} on {result['arch']}, {','.join(result['targets'])} ({result['layers']} layers): {knobs}")
    print(f"  {result['trainable_parameters']:,} trainable parameters, {share:.4%} of {result['model_parameters']:,}")
    print(f"  file: {', '.join(f'{_bytes(n)} at {name}' for name, n in result['bytes'].items())}")
    if result["trainable_parameters"]:
        print(
            f"  LoRA of rank 1 here: {result['lora_rank_1']:,} ({result['lora_rank_1'] / result['trainable_parameters']:.3g} times this)"
        )
    if result["budget"] is not None:
        print(
            f"  budget {result['budget']:,}: missed by {result['miss']:+,}{'. ' + result['note'] if result['note'] else ''}"
        )
    if result["fused"]:
        print(f"  {result['fused']}")


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"
