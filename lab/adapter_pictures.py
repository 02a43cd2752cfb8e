"""The same prompts and seeds on a base without an adapter, and with each of several, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lab import images
from lab.bases import Base, resolve
from lab.compress._engine import Report, found, places
from lab.compress._files import part_of
from lab.diffusion import encode_prompts
from lab.errors import LabError
from lab.methods.deltas import Delta
from lab.sampling import sample

STEPS, GUIDANCE = 25, 5.0


@contextlib.contextmanager
def added(row: Base, whole: Any, updates: Mapping[str, Delta]) -> Generator[None]:
    """The updates added to the base's weights, whatever methods they are of; afterwards the weights are the same tensors
    as before."""
    modules = dict(part_of(row, whole, updates).named_modules())
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for given, place in places(updates).items():
                here = found(place, modules)
                if here is None:
                    raise LabError(f"The adapter changes layer {given[:120]}, which {row.name} does not have.")
                weight: Any = modules[here.name].weight
                kept.append((weight, weight.data))
                change = updates[given].dense().to(weight.device).reshape(weight.shape)
                weight.data = (weight.data.float() + change).to(weight.dtype)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def draw(
    row: Base,
    whole: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[Image.Image]]:
    """Pictures by prompt and seed, with the base's presets for steps and guidance."""
    known = encode_prompts(whole, list(prompts))
    preset = row.preset("subject")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawn = sample(
        whole,
        [known[prompt] for prompt, _ in pairs],
        [seed for _, seed in pairs],
        known[""],
        steps=preset.get("sampling_steps", STEPS),
        guidance=preset.get("guidance", GUIDANCE),
        resolution=whole.default_sample_size * whole.vae_scale_factor,
        on_step=on_step,
    )
    return [drawn[i * len(seeds) : (i + 1) * len(seeds)] for i in range(len(prompts))]


def compared(
    base: str, before: str | Path, after: Path, prompts: Sequence[str], seeds: Sequence[int], name: str, report: Report
) -> Image.Image:
    """A sheet with a column for the base, the adapter before, and after; rows are prompts."""
    from lab.adapter_files import read

    row = resolve(base)
    if row.family != "sdxl":
        raise LabError(f"{row.name} makes no pictures: leave the prompts out.")
    whole = row.load("cpu", torch.float32)
    columns = []
    for number, source in enumerate((None, before, after)):
        report(number, 3, phase="drawing")
        updates = read(source, row).updates if source is not None else {}
        with added(row, whole, updates):
            columns.append(draw(row, whole, prompts, seeds))
    cells = [[column[p] for column in columns] for p in range(len(prompts))]
    side = 192 if cells[0][0][0].width <= 256 else 384
    return images.grid(cells, list(prompts), ["Base model", "Original", name], side=side)
