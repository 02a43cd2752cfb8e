"""LoRA, and the methods that change its start, its scale, its optimizer or its trained half, as PEFT has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods.builtin import PeftMethod
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class LoraKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    alpha: float = knob(0.0, "The update is scaled by alpha/r; 0 means alpha = r.", low=0)
    dropout: float = knob(0.0, "Share of inputs dropped in training.", low=0, high=0.9)


class Lora(PeftMethod):
    """LoRA, and the base of the rows that are LoRA with one thing changed."""

    id, name, order = "lora", "LoRA", 1
    paper = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
    kind = "weight update"
    summary = "Adds a product of two thin trained matrices to each frozen weight."
    equation = r"\Delta W = \tfrac{\alpha}{r} B A"
    knobs = LoraKnobs
    low_rank = True
    conv = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {"W": "m × n"}}
    options: dict[str, Any] = {}

    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        from peft import LoraConfig

        alpha = knobs.alpha or knobs.r
        return LoraConfig(
            r=knobs.r, lora_alpha=alpha, lora_dropout=knobs.dropout, target_modules=targets, **self.options
        )

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


register(Lora())
