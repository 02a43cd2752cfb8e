"""SVFit: the r largest singular values of the weight, trained (Sun et al. 2024, arXiv 2409.05926).

W = U_r·diag(σ)·V_rᵀ + W_e; σ (r numbers) is trained, everything else frozen, W_e the rest of the spectrum. As an
update of a weight that stays as it is: ΔW = U_r·diag(σ − σ₀)·V_rᵀ, zero at the start. No code was released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods._common import check_rank
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class SvfitKnobs(Knobs):
    r: int = knob(8, "How many singular values are trained.", low=1, size=True)


class Svfit(OwnMethod):
    """SVFit: SvfitConfig(r)."""

    id, name = "svfit", "SVFit"
    paper = Paper(
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", "2409.05926"
    )
    kind = "weight update"
    summary = "The weight's r largest singular values, trained; its singular vectors stay."
    equation = r"W' = U_r\,\mathrm{diag}(\sigma)\,V_r^\top + W_e,\qquad \Delta W = U_r\,\mathrm{diag}(\sigma - \sigma_0)\,V_r^\top"
    knobs = SvfitKnobs
    learning_rate = 5e-3
    low_rank = True
    tensors = {"trained": {"sigma": "r"}, "frozen": {"U": "m × r", "V": "r × n", "start": "r"}}
    product = ("U", "sigma", "V")
    remark = "No code was released; the paper takes ranks of several hundred, since each costs one number."

    def check(self, layer: Layer, knobs: SvfitKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: SvfitKnobs) -> int:
        return knobs.r

    def rank(self, layer: Layer, knobs: SvfitKnobs) -> int:
        return knobs.r

    def derived(self, knobs: SvfitKnobs) -> tuple[str, ...]:
        return ("U", "V")

    def init(self, start: Start, knobs: SvfitKnobs) -> Tensors:
        from lab import svd

        U, S, Vh = svd.basis(start.weight(), knobs.r)
        return Tensors({"sigma": S}, {"U": U, "V": Vh, "start": S})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: SvfitKnobs, layer: Layer) -> Any:
        return t["U"] * (t["sigma"] - t["start"]), t["V"]


register(Svfit())
