"""NLoRA: StructuredLoRA started from blocks of the weight, after Nyström (Guo et al. 2025, arXiv 2502.14482).

ΔW = s·B·N·A, all trained, B started at the weight's first r columns, A at its first r rows, N at a function of the
r×r block W₁₁ where they cross. The Nyström approximation of W takes N = W₁₁⁺; the released code takes W₁₁ itself, the
pseudo-inverse being commented out (github.com/TracyGuo2001/NLoRA (commit b086286), code/peft/src/peft/tuners/lora/layer.py,
`nlora_init`). `core` chooses; the released code's is the default. With W₁₁⁺ the start is of W's own size
(and of any size where W₁₁ is near singular), with W₁₁ of W's size cubed.
The released code does not take the start value off W, so that it starts away from the base model; by default it is
taken off here (`identity_init`), which doubles the update's rank: ΔW = s·(B·N·A − B₀·N₀·A₀).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods._common import check_rank
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, knob
from lab.methods.structuredlora import PAPER

if TYPE_CHECKING:
    import torch


@dataclass
class NloraKnobs(Knobs):
    r: int = knob(4, "Rank of the trained product.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)
    core: str = knob(
        "block", "Start of the middle matrix: the block itself, or its pseudo-inverse.", choices=("block", "pinv")
    )
    identity_init: bool = knob(True, "Take the start value off, so that training starts at the base model.")


class Nlora(OwnMethod):
    """NLoRA: NloraConfig(r, scale, core, identity_init)."""

    id, name = "nlora", "NLoRA"
    paper = PAPER
    kind = "initialisation"
    summary = "StructuredLoRA started from the weight's first rows, first columns and the block where they cross."
    equation = r"\Delta W = s\,(B N A - B_0 N_0 A_0),\quad B_0 = W_{:,:r},\ A_0 = W_{:r,:},\ N_0 = W_{:r,:r}"
    knobs = NloraKnobs
    learning_rate = 2e-3
    low_rank = True
    tensors = {
        "trained": {"B": "m × r", "N": "r × r", "A": "r × n"},
        "frozen": {"start_b": "m × r", "start_n": "r × r", "start_a": "r × n"},
    }
    remark = (
        "Nyström's method wants the pseudo-inverse of the block in the middle (core = pinv); the released code starts"
        " from the block itself, the default here. The released code leaves W unreduced; here the start is taken off."
    )

    def check(self, layer: Layer, knobs: NloraKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: NloraKnobs) -> int:
        return knobs.r * (layer.m + layer.n) + knobs.r**2

    def rank(self, layer: Layer, knobs: NloraKnobs) -> int:
        return min(knobs.r * (2 if knobs.identity_init else 1), layer.m, layer.n)

    def derived(self, knobs: NloraKnobs) -> tuple[str, ...]:
        return ("start_b", "start_a") if knobs.identity_init else ()

    def init(self, start: Start, knobs: NloraKnobs) -> Tensors:
        B, N, A = nystrom(start.weight(), knobs.r, knobs.core)
        frozen = {"start_b": B, "start_n": N, "start_a": A} if knobs.identity_init else {}
        return Tensors({"B": B, "N": N, "A": A}, frozen)

    def factors(self, t: Mapping[str, torch.Tensor], knobs: NloraKnobs, layer: Layer) -> Any:
        """B·N·A − B₀·N₀·A₀ = ((B − B₀)·N + B₀·(N − N₀))·A + B₀·N₀·(A − A₀): no difference of large products."""
        import torch

        s = knobs.scale
        if not knobs.identity_init:
            return (t["B"] @ t["N"]) * s, t["A"]
        B, N = t["start_b"], t["start_n"]
        moved = (t["B"] - B) @ t["N"] + B @ (t["N"] - N)
        return torch.cat((moved, B @ N), dim=1) * s, torch.cat((t["A"], t["A"] - t["start_a"]))


def nystrom(weight: torch.Tensor, r: int, core: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First r columns (m, r), middle (r, r) and first r rows (r, n) of the weight."""
    import torch

    block = weight[:r, :r]
    middle = block.clone() if core == "block" else torch.linalg.pinv(block.double()).float()
    return weight[:, :r].clone(), middle, weight[:r].clone()


register(Nlora())
