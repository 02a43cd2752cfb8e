"""IntermediateTune: NLoRA with only its middle matrix trained (Guo et al. 2025, arXiv 2502.14482).

ΔW = s·B·(N − N₀)·A with B the weight's first r columns and A its first r rows, frozen, and N (r×r) trained, started at
N₀ as in NLoRA. Official code: github.com/TracyGuo2001/NLoRA (commit b086286), code/inttune.py (`lora_A`, `lora_B` requires_grad = False).
The released code does not take B·N₀·A off W; here it is, which costs no rank: B and A do not move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods._common import check_rank
from lab.methods.nlora import nystrom
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, knob
from lab.methods.structuredlora import PAPER

if TYPE_CHECKING:
    import torch


@dataclass
class InttuneKnobs(Knobs):
    r: int = knob(8, "Side of the trained square matrix: the update's rank.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)
    core: str = knob(
        "block", "Start of the middle matrix: the block itself, or its pseudo-inverse.", choices=("block", "pinv")
    )


class Inttune(OwnMethod):
    """IntermediateTune: InttuneConfig(r, scale, core)."""

    id, name = "inttune", "IntTune"
    paper = PAPER
    kind = "weight update"
    summary = "A trained r×r matrix between the weight's own first r columns and first r rows."
    equation = r"\Delta W = s\,\underbrace{W_{:,:r}}_{\text{frozen}} (N - N_0) \underbrace{W_{:r,:}}_{\text{frozen}}"
    knobs = InttuneKnobs
    learning_rate = 3e-3
    low_rank = True
    tensors = {"trained": {"N": "r × r"}, "frozen": {"B": "m × r", "A": "r × n", "start": "r × r"}}
    product = ("B", "N", "A")
    remark = "The released code leaves W unreduced at the start; here the start value is taken off, so the core's start does not matter."

    def check(self, layer: Layer, knobs: InttuneKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: InttuneKnobs) -> int:
        return knobs.r**2

    def rank(self, layer: Layer, knobs: InttuneKnobs) -> int:
        return knobs.r

    def derived(self, knobs: InttuneKnobs) -> tuple[str, ...]:
        return ("B", "A")

    def init(self, start: Start, knobs: InttuneKnobs) -> Tensors:
        B, N, A = nystrom(start.weight(), knobs.r, knobs.core)
        return Tensors({"N": N}, {"B": B, "A": A, "start": N})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: InttuneKnobs, layer: Layer) -> Any:
        return (t["B"] @ (t["N"] - t["start"])) * knobs.scale, t["A"]


register(Inttune())
