"""Which base an adapter was made for, told by its layers' names and widths; and whether it fits another one."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab import architectures
from lab.adapter_files._header import times
from lab.bases import BASES, Base
from lab.errors import LabError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Family:
    """A kind of base: `id` is an architecture's; `base` a registered base of it, or ""."""

    id: str
    name: str
    base: str = ""


FAMILIES = {
    "tiny-sdxl": Family("tiny-sdxl", "Tiny SDXL", "tiny-sdxl"),
    "sdxl-unet": Family("sdxl-unet", "SDXL", "sdxl"),
    "sd15-unet": Family("sd15-unet", "SD 1.5"),
    "sd2": Family("sd2", "SD 2"),
    "flux": Family("flux", "Flux"),
    "clip": Family("clip", "a CLIP model"),
    "language": Family("language", "a language model"),
    "": Family("", ""),
}
_WIDTHS = {768: "sd15-unet", 1024: "sd2", 2048: "sdxl-unet", 320: "tiny-sdxl"}  # of the cross-attention


def cross_attention(shapes: Shapes) -> int | None:
    """Width of the text that the cross-attention reads, None where no such layer is there."""
    found = (s for name, s in shapes.items() if name.endswith(("attn2.to_k", "attn2.to_v")))
    return next((math.prod(s[1:]) for s in found), None)


def guess(shapes: Shapes) -> Family:
    """The family whose names and widths the layers have; FAMILIES[""] when none is told by them."""
    if (width := cross_attention(shapes)) in _WIDTHS:
        return FAMILIES[_WIDTHS[width]]
    if width is not None:
        return FAMILIES[""]
    best, share = "", 0.5
    for id in ("tiny-sdxl", "sdxl-unet", "sd15-unet"):  # of equal ones the first
        known = table(id)
        fits = [known[name] for name in shapes if name in known]
        hit = sum(same(shapes[n], known[n]) for n in shapes if n in known)
        if fits and hit / len(fits) > share and (hit == len(fits) or hit / len(fits) > 0.9):
            best, share = id, hit / len(fits)
    if best:
        return FAMILIES[best]
    names = list(shapes)[:50]
    if any(n.startswith(("transformer.", "single_transformer_blocks", "double_blocks")) for n in names):
        return FAMILIES["flux"]
    if any("model.layers." in n and "self_attn" in n for n in names):
        return FAMILIES["language"]
    return FAMILIES["clip" if any("resblocks." in n for n in names) else ""]


@functools.cache
def table(id: str) -> dict[str, Shape]:
    """Layers of a shipped architecture with its text encoders', by the names of adapter files."""
    found = architectures.load(id)
    shapes: dict[str, Shape] = {
        row.layer.name: (row.layer.out, row.layer.in_, *(row.layer.kernel or ())) for row in found.rows
    }
    for prefix, companion in zip(("text_encoder.", "text_encoder_2."), found.companions, strict=False):
        for row in architectures.load(companion).rows:
            name = row.layer.name if row.layer.name.startswith("text_model.") else f"text_model.{row.layer.name}"
            shapes[prefix + name] = (row.layer.out, row.layer.in_)
    return shapes


def same(given: Shape, base: Shape) -> bool:
    """Equal, or equal when a kernel is folded into the inputs, or a 1×1 convolution is a matrix."""
    return given[0] == base[0] and math.prod(given[1:]) == math.prod(base[1:])


def layers_a_block(row: Base | None) -> int | None:
    """Of the base's UNet, None where its configuration is not at hand."""
    try:
        return (
            int(json.loads((Path(row.source) / "unet" / "config.json").read_text())["layers_per_block"])
            if row
            else None
        )
    except (OSError, ValueError, KeyError):
        return None


def check(called: str, shapes: Shapes, base: Shapes, row: Base) -> None:
    """Raise LabError, in one sentence, when an adapter's layers are not this base's."""
    ours, theirs = cross_attention(shapes), cross_attention(base)
    if ours and theirs and ours != theirs:
        made = guess(shapes).name or "another base"
        raise LabError(
            f"{called} was made for {made}: its cross-attention is {ours} wide, {row.name}'s is {theirs}; choose its own base."
        )
    unknown = [name for name in shapes if name not in base]
    if unknown:
        made = guess(shapes).name
        made = f" (it looks like one for {made})" if made and FAMILIES[guess(shapes).id].base != row.id else ""
        raise LabError(
            f"{called} was made for another base{made}: it changes {unknown[0][:100]}"
            f"{f' and {len(unknown) - 1} more layers' if len(unknown) > 1 else ''}, which {row.name} does not have."
        )
    for name, shape in shapes.items():
        if not same(shape, base[name]):
            raise LabError(
                f"{called} was made for another base: layer {name[:100]} is {times(list(shape))} in it and "
                f"{times(list(base[name]))} in {row.name}."
            )


def base_named(text: str) -> Base | None:
    """A registered base by id, source or name, as adapters' configurations and metadata write it."""
    return next((row for row in BASES if text and text in (row.id, row.source, row.public_name, row.name)), None)
