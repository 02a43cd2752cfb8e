"""Block-LoRA: LoRA cut into blocks that share one down-projection (Zhou et al. 2025, arXiv 2501.16720).

LoRA's B = [B_1 … B_N], A = [A_1; …; A_N] in blocks of r/N ranks; all A_i are one trained A_s ((r/N)×n), so that
ΔW = s·Σ_i B_i·A_i = s·(B_1 + … + B_N)·A_s: matrix products become sums. r·m + (r/N)·n trained numbers, an update of rank
r/N. Read from the paper's abstract; no official code was found. The sum can do nothing that one B of rank r/N could
not: what the blocks change is how fast it learns, N times as fast under Adam. B starts at zero, A_s as LoRA's A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class BlockLoraKnobs(Knobs):
    r: int = knob(4, "Columns of all blocks together; the update's rank is r / blocks.", low=1, size=True)
    blocks: int = knob(2, "How many blocks share the down-projection; must divide r.", low=1)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.blocks:
            raise LabError(f"blocks must divide r = {self.r}, got {self.blocks}.")


class BlockLora(OwnMethod):
    """Block-LoRA: BlockloraConfig(r, blocks, scale)."""

    id, name = "block-lora", "Block-LoRA"
    paper = Paper(
        "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning", "2501.16720"
    )
    kind = "weight update"
    summary = "LoRA in blocks whose down-projections are one and the same, so that the up-projections add."
    equation = r"\Delta W = s\,(B_1 + \dots + B_N)\,A_s"
    knobs = BlockLoraKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"B": "N × m × r/N", "A": "r/N × n"}, "frozen": {}}
    remark = "Read from the abstract; no official code was found, so that the blocks' start and scale are not settled."

    def count_layer(self, layer: Layer, knobs: BlockLoraKnobs) -> int:
        return knobs.r * layer.m + knobs.r // knobs.blocks * layer.n

    def rank(self, layer: Layer, knobs: BlockLoraKnobs) -> int:
        return min(knobs.r // knobs.blocks, layer.m, layer.n)

    def init(self, start: Start, knobs: BlockLoraKnobs) -> Tensors:
        each = knobs.r // knobs.blocks
        return Tensors({"B": start.zeros(knobs.blocks, start.layer.m, each), "A": start.kaiming(each, start.layer.n)})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: BlockLoraKnobs, layer: Layer) -> Any:
        return t["B"].sum(0) * knobs.scale, t["A"]


register(BlockLora())
