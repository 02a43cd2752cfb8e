"""What training an adapter on SDXL takes of a GPU, estimated, and what fits on which card.

    python -m lab bench sdxl_memory --write            the tables, from the steps traced before
    python -m lab bench sdxl_memory --trace --write    traced anew: ten minutes

The UNet's part comes from a step of the real model with fake tensors (`_fake_step.py`): two resolutions, with and
without gradient checkpointing, kept in lab/bench/sdxl_memory.csv; between and beyond them it is a line in pixels × batch.
The adapter's part is `lab.memory`'s. `--write` puts the tables into lab/bench/sdxl.md.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from pathlib import Path
from typing import Any

from lab.bases.sdxl import PRESETS
from lab.bench import _tables

HELP = "estimated peak memory of SDXL training, by method, settings and card"
TRACES = Path(__file__).with_suffix(".csv")
TABLE = Path(__file__).parent / "sdxl.md"
FIELDS = ("step", "checkpointing", "resolution", "weights", "peak")
CARDS = (12, 16, 24, 48, 80)  # GB on the box, GiB in fact or a little less
LEFT_SHARE, LEFT_BYTES = 0.08, 600 * 2**20  # for the allocator's gaps; for CUDA's context and the libraries
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, r 4 (preset)": ("lora", {}),
    "LoRA, r 8": ("lora", {"r": 8}),
    "LoRA, r 64": ("lora", {"r": 64}),
    "DoRA, r 8": ("dora", {"r": 8}),
    "NoRA, r_outer 0.8": ("nora", {}),
    "NoRA, r_outer 128, r_inner 40 (preset)": ("nora", PRESETS["knobs"]["nora"]),
    "NOLA, hadamard": ("nola", {"r": 8, "basis": "hadamard"}),
    "VeRA": ("vera", {}),
}
COLUMNS: dict[str, dict[str, Any]] = {
    "1024 px, batch 1": {"resolution": 1024, "batch": 1, "checkpointing": True},
    "1024 px, batch 4": {"resolution": 1024, "batch": 4, "checkpointing": True},
    "1024 px, batch 1, none": {"resolution": 1024, "batch": 1, "checkpointing": False},
    "512 px, batch 1": {"resolution": 512, "batch": 1, "checkpointing": True},
}
BLOCKS = 70  # of attention: with checkpointing one of them at a time keeps anything
LARGEST = 64
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", action="store_true", help="trace the UNet's and the VAE's steps anew")
    parser.add_argument("--write", action="store_true", help="write the tables into lab/bench/sdxl.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"settings": [...], "cards": [...], "drawing": {...}}: bytes."""
    if args.trace or not TRACES.is_file():
        trace()
    settings = [
        {"method": name, "text_encoder": text}
        | {label: total(name, text_encoder=text, **chosen) for label, chosen in COLUMNS.items()}
        for name in METHODS
        for text in (False, True)
        if not text or name == "LoRA, r 8"
    ]
    cards = [{"card": card} | {name: largest(name, card) for name in METHODS} for card in CARDS]
    made = {"settings": settings, "cards": cards, "drawing": drawing()}
    if args.write:
        from lab.bench._sdxl_random import HEAD

        _tables.write(TABLE, "memory", table(made), HEAD)
    return made


# -- traces ------------------------------------------------------------------------------------------------
def trace() -> None:
    """Trace every step of the table; about a minute each."""
    from lab.bench import _fake_step, _sdxl_random

    config = _sdxl_random.released("unet")
    rows = []
    for resolution in (512, 1024):
        for step, checkpointing in (("train", True), ("train", False), ("draw", False)):
            found = _fake_step.unet_step(config, resolution, 1, checkpointing=checkpointing, train=step == "train")
            rows.append((step, checkpointing, resolution, found.weights, found.peak))
            print(step, checkpointing, resolution, f"{found.peak / GIB:.2f} GiB", file=sys.stderr, flush=True)
        found = _fake_step.decoding(_sdxl_random.released("vae"), resolution)
        rows.append(("decode", False, resolution, found.weights, found.peak))
    with TRACES.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])


@functools.cache
def traced() -> dict[tuple[str, bool, int], tuple[int, int]]:
    """(step, checkpointing, resolution) → (weights, peak beside them), bytes."""
    with TRACES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["step"], row["checkpointing"] == "True", int(row["resolution"])): (int(row["weights"]), int(row["peak"]))
        for row in rows
    }


def peak(step: str, checkpointing: bool, resolution: int, batch: int = 1) -> float:
    """Bytes beside the weights: a line in pixels × batch through the two resolutions traced."""
    low, high = (traced()[step, checkpointing, side][1] for side in (512, 1024))
    slope = (high - low) / (1024**2 - 512**2)
    return low + slope * (batch * resolution**2 - 512**2)


# -- totals ------------------------------------------------------------------------------------------------
def total(
    name: str, *, resolution: int, batch: int, checkpointing: bool, text_encoder: bool = False, eight_bit: bool = False
) -> float:
    """Peak bytes of a training step with this method."""
    from lab import architectures, budget, memory
    from lab.bases import BASES
    from lab.methods import METHODS as REGISTRY
    from lab.tasks.subject import layers

    id, given = METHODS[name]
    method = REGISTRY[id]
    knobs, unet = method.knobs.parse(given), architectures.load("sdxl-unet")
    rows = unet.select("attn")
    adapted = layers(BASES["sdxl"], "attn", text_encoder)
    count = budget.count(method, adapted, knobs)
    size = resolution / 1024
    kept = memory.estimate(unet, rows, method, knobs, batch=batch, size=size, precision="bf16").adapter
    held = (
        traced()["train", checkpointing, 1024][0]
        + count * (10 if eight_bit else 16)
        + memory.frozen(method, adapted, knobs)
    )
    if text_encoder:
        for encoder in ("sdxl-te1", "sdxl-te2"):
            arch = architectures.load(encoder)
            held += memory.estimate(arch, arch.select("attn"), method, knobs, batch=batch, precision="bf16").kept
            held += 2 * arch.parameters
    return held + peak("train", checkpointing, resolution, batch) + kept / (BLOCKS if checkpointing else 1)


def usable(card: int) -> float:
    return card * GIB * (1 - LEFT_SHARE) - LEFT_BYTES


def largest(name: str, card: int) -> dict[str, int]:
    """The largest batch (0: none) that fits at 1024 pixels, with and without checkpointing, and at 512 with it."""

    def most(resolution: int, checkpointing: bool) -> int:
        fits = 0
        while fits < LARGEST:
            if total(name, resolution=resolution, batch=fits + 1, checkpointing=checkpointing) > usable(card):
                break
            fits += 1
        return fits

    return {"with": most(1024, True), "without": most(1024, False), "512": most(512, True)}


def drawing() -> dict[str, float]:
    """Peak bytes of drawing four pictures of 1024 pixels at once: all on the GPU, encoders and VAE off it while the
    UNet works, and with offload, where the UNet is off it while the VAE works."""
    from lab import architectures

    unet, vae = traced()["draw", False, 1024][0], traced()["decode", False, 1024][0]
    denoise, decode = peak("draw", False, 1024, 4), peak("decode", False, 1024)
    encoders = 2 * sum(architectures.load(id).parameters for id in ("sdxl-te1", "sdxl-te2"))
    return {
        "everything on the GPU": unet + vae + encoders + max(denoise, decode),
        "encoders and VAE off it while the UNet works (always)": max(unet + denoise, unet + vae + decode),
        "the UNet off it while the VAE decodes (offload)": max(unet + denoise, vae + decode),
    }


# -- output --------------------------------------------------------------------------------------------------
def table(made: dict[str, Any]) -> str:
    lines = [
        "## Peak memory of training, estimated, GiB",
        "",
        "Base in fp16, products in bf16, adapters and AdamW in fp32 on all 560 attention projections, cached latents and "
        "embeddings, encoders and VAE off the GPU. With gradient checkpointing but where it says none. Tensors alone: "
        "CUDA's context, the allocator's gaps and cuDNN's workspaces come on top.",
        "",
        "| method | " + " | ".join(COLUMNS) + " |",
        "|-|" + "-:|" * len(COLUMNS),
    ]
    for row in made["settings"]:
        name = row["method"] + (", text encoders too" if row["text_encoder"] else "")
        lines.append(f"| {name} | " + " | ".join(f"{row[label] / GIB:.1f}" for label in COLUMNS) + " |")
    lines += [
        "",
        "## Largest batch at 1024 px that fits, estimated: with / without gradient checkpointing",
        "",
        f"{LEFT_SHARE:.0%} of the card and {LEFT_BYTES / 2**20:.0f} MiB are left free; at most {LARGEST} is looked for. "
        "512: only at 512 px, with checkpointing.",
        "",
        "| card, GB | " + " | ".join(METHODS) + " |",
        "|-:|" + "-:|" * len(METHODS),
    ]
    for row in made["cards"]:
        lines.append(f"| {row['card']} | " + " | ".join(_cell(row[name]) for name in METHODS) + " |")
    lines += ["", "## Drawing four pictures of 1024 px at once, estimated, GiB", "", "| | |", "|-|-:|"]
    lines += [f"| {what} | {size / GIB:.1f} |" for what, size in made["drawing"].items()]
    return "\n".join(lines)


def _cell(found: dict[str, int]) -> str:
    if found["with"]:
        return f"{found['with']} / {found['without'] or '–'}"
    return f"512: {found['512']}" if found["512"] else "–"


def show(made: dict[str, Any]) -> None:
    print(table(made))
