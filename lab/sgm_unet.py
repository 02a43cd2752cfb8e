"""A UNet of SDXL's plan in the original (sgm) code's names: how deep its transformers are, and diffusers' configuration
for that. Imports no torch.

SDXL's prunes keep its nine input and nine output blocks and shorten the transformers in them; some lose the middle
block's transformer, or all of it: SSD-1B and Segmind-Vega (Gupta et al., arXiv 2401.02677). Numbers are those of the
blocks in the file: `input_blocks.{n}`, `output_blocks.{n}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.errors import LabError

BLOCKS = 9  # on either side: three a resolution
_TRANSFORMER = re.compile(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1\.transformer_blocks\.(\d+)\.")
# Input blocks 0, 3 and 6 are the first convolution and the two that halve the picture: no transformer can be there.
_DOWN = ((1, 2), (4, 5), (7, 8))
_UP = ((0, 1, 2), (3, 4, 5), (6, 7, 8))


@dataclass(frozen=True)
class Depths:
    """Transformer layers of each block, 0 for a block without a transformer.

    down: of input blocks 1, 2, 4, 5, 7, 8; up: of output blocks 0 to 8; middle: None where the middle block holds one
    residual block alone, -1 where there is no middle block
    """

    down: tuple[int, ...]
    middle: int | None
    up: tuple[int, ...]


SDXL = Depths((0, 0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0))
SHIPPED = {  # the layer tables in assets/architectures
    SDXL: "sdxl-unet",
    Depths((0, 0, 2, 2, 4, 4), None, (4, 4, 10, 2, 1, 1, 0, 0, 0)): "ssd-1b",
}


def depths(names: Iterable[str]) -> Depths:
    """Of the UNet whose tensors have these names, without the checkpoint's prefix.

    Raises LabError, a clause for the end of a sentence, where blocks or layers are missing between others.
    """
    names = list(names)
    for side in ("input_blocks", "output_blocks"):
        there = {int(m[1]) for name in names if (m := re.match(rf"{side}\.(\d+)\.", name))}
        if there != set(range(BLOCKS)):
            raise LabError(f"its UNet has {len(there)} {side.replace('_', ' ')} where SDXL's has {BLOCKS}")
    layers: dict[str, set[int]] = {}
    for match in filter(None, map(_TRANSFORMER.match, names)):
        layers.setdefault(match[1], set()).add(int(match[2]))
    for block, numbers in layers.items():
        if numbers != set(range(len(numbers))):
            raise LabError(f"a transformer layer is missing in its {block}")
    found = {block: len(numbers) for block, numbers in layers.items()}
    return Depths(
        tuple(found.get(f"input_blocks.{n}", 0) for pair in _DOWN for n in pair),
        _middle(names, found),
        tuple(found.get(f"output_blocks.{n}", 0) for n in range(BLOCKS)),
    )


def _middle(names: list[str], found: dict[str, int]) -> int | None:
    parts = {name.split(".")[1] for name in names if name.startswith("middle_block.")}
    whole = {"0", "1", "2"} if "middle_block" in found else {"0"}
    if parts and parts != whole:
        raise LabError("its middle block is not whole")
    return found.get("middle_block") if parts else -1


def configuration(of: Depths) -> dict[str, Any]:
    """Entries of diffusers' UNet configuration in which these depths differ from SDXL's; {} for SDXL's own.

    Raises LabError, a clause for the end of a sentence, where no configuration of diffusers describes such a UNet: its
    blocks have transformers throughout or not at all, and the middle one is as deep as the last before it.
    """
    if of == SDXL:
        return {}
    down = [of.down[i : i + 2] for i in (0, 2, 4)]
    up = [of.up[i : i + 3] for i in (0, 3, 6)]
    if any(0 in block and any(block) for block in (*down, *up)):
        raise LabError("one of its blocks has a transformer in some layers and none in others")
    if of.middle not in (None, -1, down[-1][0]):
        raise LabError(f"its middle block has {of.middle} transformer layers, the one before it {down[-1][0]}")
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if all(block) else "DownBlock2D" for block in down],
        "mid_block_type": {None: "UNetMidBlock2D", -1: None}.get(of.middle, "UNetMidBlock2DCrossAttn"),
        "up_block_types": ["CrossAttnUpBlock2D" if all(block) else "UpBlock2D" for block in up],
        "transformer_layers_per_block": [_said(block) for block in down],
        "reverse_transformer_layers_per_block": [_said(block) for block in up],
    }


def _said(block: Sequence[int]) -> int | list[int]:
    """A block's depths as diffusers writes them: 1, never 0, for one without transformers."""
    return max(1, block[0]) if len(set(block)) == 1 else list(block)
