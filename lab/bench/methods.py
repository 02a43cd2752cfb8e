"""What the methods cost against LoRA of the same update rank, and ours against their plain forms.

    python -m lab bench methods                 everything: about half an hour of one core
    python -m lab bench methods --only ours     one part: ours, everyone, embedded, memory, files, starts

Ratios within one run, of CPU seconds of one thread, so that other programs on the machine do not count. `--write` puts the tables into lab/bench/methods.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from lab.bench import _tables

HELP = "step time, memory, files and starts of the methods, as ratios"
PARTS = ("ours", "embedded", "memory", "files", "starts", "everyone")
TABLE = Path(__file__).with_suffix(".md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone (may be given several times)")
    parser.add_argument("--repetitions", type=int, default=3, help="least time of so many")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the step of every method")
    parser.add_argument("--layers", type=int, default=2, help="layers of each shape whose start is measured")
    parser.add_argument("--write", action="store_true", help="write the parts measured into lab/bench/methods.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lab.bench import _sdxl_sized as sized
    from lab.bench import _steps as steps
    from lab.errors import LabError

    for name in ("repetitions", "tokens", "layers"):
        if getattr(args, name) < 1:
            raise LabError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = {
        "ours": lambda: steps.ours(args.repetitions),
        "embedded": lambda: steps.embedded(5 * args.repetitions),
        "memory": lambda: _memory(sized),
        "files": sized.file_overheads,
        "starts": lambda: [{"r_outer": r} | sized.starts(args.layers, r) for r in (64, 0.8)],
        "everyone": lambda: steps.everyone(args.repetitions, args.tokens),
    }
    found: dict[str, Any] = {}
    for name in args.only or PARTS:
        began = time.perf_counter()
        found[name] = parts[name]()
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if args.write:
            _write(name, found[name])
    torch.set_num_threads(threads)
    return found


def _memory(sized: Any) -> dict[str, Any]:
    nola = {"r": 8, "k": 1000, "l": 1000, "basis": "hadamard"}
    held = {
        "LoRA, r 8": sized.held_bytes("lora", r=8),
        "NOLA hadamard, r 8, k = l = 1000": sized.held_bytes("nola", **nola),
    }
    return {"held_mib": {k: v / 2**20 for k, v in held.items()}}


# -- tables -----------------------------------------------------------------------------------------------
def lines(name: str, found: Any) -> list[str]:
    """One part's table in Markdown."""
    if name == "ours":
        body = [f"| {r['what']} | {r['seconds'] * 1e3:.0f} | {r['to_lora']:.3f} |" for r in found["rows"]]
        return [
            "## Step of one adapted layer, 1280 → 1280, 4096 tokens, forward and backward",
            "",
            "| | ms of one thread | against LoRA r 8 |",
            "|-|-:|-:|",
            *body,
            "",
            f"Plain NoRA over NoRA: {found['plain_nora_over_nora']:.2f}. Plain NOLA over NOLA (hadamard), whole step:"
            f" {found['plain_nola_over_nola']:.2f}; what the adapter adds to the layer, alone:"
            f" {found['plain_nola_over_nola_adapter_alone']:.1f}.",
        ]
    if name == "everyone":
        head = [
            "## The same step for every method at its default settings",
            "",
            "| method | LoRA's rank | against it |",
        ]
        return [*head, "|-|-:|-:|", *(f"| {r['method']} | {r['lora_rank']} | {r['to_lora']:.2f} |" for r in found)]
    if name == "embedded":
        head = [
            "## Training step of the embedded base, batch 4, all attention projections",
            "",
            "| | ms of one thread | against LoRA r 8 |",
        ]
        return [*head, "|-|-:|-:|", *(f"| {r['method']} | {r['ms']:.0f} | {r['to_lora']:.3f} |" for r in found)]
    if name == "memory":
        head = [
            "## Held in a training step on 560 projections of SDXL's shapes",
            "",
            "Tensors, gradients, AdamW's averages, what is kept for the backward pass and what is cached of the basis, without the base.",
            "",
            "| | MiB |",
        ]
        return [*head, "|-|-:|", *(f"| {k} | {v:.1f} |" for k, v in found["held_mib"].items())]
    if name == "files":
        head = [
            "## Bytes of a file beyond its parameters and tensor names (8 layers)",
            "",
            "Stored: frozen factors that come from a batch of data, which nobody can make again from the base.",
            "",
            "| method | parameters | bytes beyond | bytes stored |",
            "|-|-:|-:|-:|",
        ]
        return [*head, *(f"| {r['method']} | {r['parameters']} | {r['beyond']} | {r['stored'] or ''} |" for r in found)]
    head = [
        "## NoRA's start on 560 projections of SDXL's shapes",
        "",
        "CPU seconds of one thread. Spectra σᵢ ∝ (1 + i/30)^-0.8. Error: sine of the largest angle to the subspace of a double-precision SVD.",
        "",
        "| r_outer | torch.linalg.svd, s | in double, s | lab, s | times faster | than double | from the cache, s | error of svd | error of lab |",
        "|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for r in found:
        s, e = r["seconds"], r["subspace_error"]
        head.append(
            f"| {r['r_outer']} | {s['svd']:.0f} | {s['svd64']:.0f} | {s['lab']:.0f} | {r['speedup']:.2f} | {r['speedup64']:.2f} | {s['cache']:.1f} |"
            f" {e['svd']:.1e} | {e['lab']:.1e} |"
        )
    return head


def _write(name: str, found: Any) -> None:
    _tables.write(
        TABLE, name, "\n".join(lines(name, found)), "# Methods, measured\n\n`python -m lab bench methods --write`\n"
    )


def show(result: dict[str, Any]) -> None:
    for name, found in result.items():
        print("\n".join(lines(name, found)), end="\n\n")
