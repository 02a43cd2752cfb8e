"""StructuredLoRA (SLoRA): a trained r×r matrix between LoRA's two (Guo et al. 2025, arXiv 2502.14482).

ΔW = s·B·N·A with B (m×r) zero at the start, N (r×r) and A (r×n) uniform as LoRA's A; all three trained. Official code:
github.com/TracyGuo2001/NLoRA (commit b086286), code/peft/src/peft/tuners/lora/layer.py (`slora_init`). What N adds to what B·A can
reach is nothing; it changes how training gets there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch

PAPER = Paper("NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", "2502.14482")


@dataclass
class StructuredLoraKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)


class StructuredLora(OwnMethod):
    """StructuredLoRA: StructuredloraConfig(r, scale)."""

    id, name = "structuredlora", "StructuredLoRA"
    paper = PAPER
    kind = "weight update"
    summary = "LoRA with a trained r×r matrix between its two factors."
    equation = r"\Delta W = s\, B N A"
    knobs = StructuredLoraKnobs
    learning_rate = 3e-3
    low_rank = True
    tensors = {"trained": {"B": "m × r", "N": "r × r", "A": "r × n"}, "frozen": {}}

    def count_layer(self, layer: Layer, knobs: StructuredLoraKnobs) -> int:
        return knobs.r * (layer.m + layer.n) + knobs.r**2

    def rank(self, layer: Layer, knobs: StructuredLoraKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: StructuredLoraKnobs) -> Tensors:
        m, n, r = start.layer.m, start.layer.n, knobs.r
        return Tensors({"B": start.zeros(m, r), "N": start.kaiming(r, r), "A": start.kaiming(r, n)})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: StructuredLoraKnobs, layer: Layer) -> Any:
        return t["B"] * knobs.scale, t["N"] @ t["A"]


register(StructuredLora())
