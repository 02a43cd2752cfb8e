"""A trained adapter written anew by another method at a smaller size, without any training data: least squares on ΔW.

    python -m lab compress fox.safetensors --method nora --budget 20000 --out small
    python -m lab compress runs/lora-s0/adapter --method nola --set r=2 --set k=256 --set l=256 --out small
    python -m lab compress fox.safetensors --method lora --budget 20000 --prompt "a fox in the snow" --out small

OUT is then a PEFT folder that `PeftModel.from_pretrained` loads and `lab export` writes in other layouts, with report.json
beside it, and with --prompt pictures.png: the base's, the original's and the compressed one's, same prompts and seeds.
The budget is the largest number of parameters over all layers; without one, --set gives the sizes.
"""

from __future__ import annotations

import argparse
from typing import Any

NAME = "compress"
HELP = "fit a trained adapter with a smaller method, without data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, .safetensors file or zip")
    parser.add_argument("--method", required=True, metavar="ID", help="lora, nora, nola, pranc or lora-xs")
    parser.add_argument("--budget", metavar="N", help="parameters at most, over all layers")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="hold a setting")
    parser.add_argument("--base", help="base model that it is laid on; default: the one it names, if at hand")
    parser.add_argument("--seed", default="0", metavar="N", help="seed of pseudo-random bases (default 0)")
    parser.add_argument(
        "--prompt", action="append", default=[], help="also draw this, before and after; again for more"
    )
    parser.add_argument("--seeds", default="0,1", metavar="N,N,…", help="of the pictures' noise (default 0,1)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from lab import budget as budgets
    from lab.cli import parse_numbers, parse_settings, progress
    from lab.compress import FITS
    from lab.compress._files import compress_file
    from lab.errors import LabError
    from lab.files import write_json

    fit = FITS[args.method]
    given = parse_settings(args.set)
    if strange := sorted(set(given) - {"", fit.id}):
        raise LabError(f"--set names {', '.join(strange)}, but the method is {fit.id}.")
    held = {**given.get("", {}), **given.get(fit.id, {})}
    if args.budget is None and not held:
        raise LabError("Say how small: --budget N, or the method's sizes with --set.")
    budget = None if args.budget is None else budgets.check_budget(args.budget)
    seed, seeds = parse_numbers(args.seed, "--seed")[0], parse_numbers(args.seeds, "--seeds")
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise LabError(f"{out} is not empty: choose another folder.")
    parsed = {name: getattr(fit.knobs(held), name) for name in held}
    result = compress_file(args.adapter, fit.id, budget, out, base=args.base, given=parsed, seed=seed, report=progress)
    if args.prompt:
        from lab.adapter_pictures import compared

        sheet = compared(result["base"], args.adapter, out, args.prompt, seeds, fit.method.name, report=progress)
        sheet.save(out / "pictures.png")
        result["pictures"] = str(out / "pictures.png")
    write_json(out / "report.json", result)
    return result


def show(result: dict[str, Any]) -> None:
    before, settings = result["original"], {k: v for k, v in result["knobs"].items() if isinstance(v, int | float)}
    words = ", ".join(f"{k}={v:g}" for k, v in settings.items() if v is not True and v is not False)
    print(f"{before['name']}: {before['parameters']:,} parameters, {before['bytes']:,} bytes ({before['kind']})")
    print(f"{result['name']}: {result['parameters']:,} parameters, {result['bytes']:,} bytes ({words})")
    print(f"relative error {result['relative_error']:.4g} over {len(result['layers'])} layers; by {result['how']}")
    worst = sorted(result["layers"], key=lambda r: -r["relative_error"])
    for title, rows in (("best fitted", worst[:-4:-1]), ("worst fitted", worst[:3])):
        print(f"{title}: " + "; ".join(f"{r['layer']} {r['relative_error']:.3g}" for r in rows))
    print(result["adapter"])
