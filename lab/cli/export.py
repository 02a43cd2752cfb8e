"""An adapter as a file that other programs read.

    python -m lab export runs/nora-s0/adapter --to kohya my-fox.safetensors

diffusers: StableDiffusionXLPipeline.load_lora_weights. kohya: ComfyUI, A1111, Forge. peft: a plain LoRA folder.
merged: the whole network with the update in its weights. Exact where the update is of low rank, else a truncated SVD.
"""

from __future__ import annotations

import argparse
from typing import Any

NAME = "export"
HELP = "write an adapter as a diffusers, kohya or PEFT LoRA, or merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a saved adapter folder")
    parser.add_argument("out", metavar="OUT", help="folder, or name of a .safetensors file")
    parser.add_argument("--to", required=True, choices=("diffusers", "kohya", "peft", "merged"), help="layout")
    parser.add_argument("--base", help="base model, if the adapter's configuration does not name it")
    parser.add_argument("--rank", type=int, help="rank of the truncated SVD of a full-rank update (default 32)")
    parser.add_argument("--half", action="store_true", help="store fp16 in place of fp32")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lab.errors import LabError
    from lab.export import export

    if args.rank is not None and args.rank < 1:
        raise LabError(f"--rank must be at least 1, got {args.rank}.")
    return export(args.adapter, args.to, args.out, base=args.base, rank=args.rank, half=args.half)


def show(result: dict[str, Any]) -> None:
    for path in result["files"]:
        print(path)
    error = result["relative_error"]
    print(f"relative error {error:.1e}" + ("" if error < 1e-3 else ": the update is not of low rank; raise --rank"))
