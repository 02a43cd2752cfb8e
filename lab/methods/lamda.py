"""LaMDA: a trained r×r matrix before a projection that is frozen bit by bit (Azizi et al. 2024, arXiv 2406.12832).

W' = W + s·(B·S·A − B₀·S₀·A): A = V_rᵀ (the paper's PMA) frozen, S (r×r, LDA) trained from Σ_r, B (m×r, PMB) trained
from U_r and frozen gradually over the first `freeze` of the steps; afterwards S alone is trained. B's columns freeze
from the smallest singular value's on, a linear number of them.
The release (github.com/ArminAzizi98/LaMDA, commit 78faf18, lamda.py) has neither the spectral start nor the freezing: it freezes a
random A, adds S, and trains B from zero. The paper's abstract and Figure 1 say that the projections are made
from W's singular vectors and that PMB freezes by singular values; the order and pace of freezing, and that the
start value is taken off W, are our reading.
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
class LamdaKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update.", low=1e-6)
    freeze: float = knob(0.3, "Share of the steps over which B is frozen, column by column.", low=0, high=1)


class Lamda(OwnMethod):
    """LaMDA: LamdaConfig(r, scale, freeze)."""

    id, name = "lamda", "LaMDA"
    paper = Paper("LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "2406.12832")
    kind = "weight update"
    summary = "A trained r×r matrix between singular vectors of the weight, of which one side trains along at first."
    equation = r"\Delta W = s\,(B S - U_r \Sigma_r)\,\underbrace{V_r^\top}_{\text{frozen}},\qquad B \text{ frozen column by column}"
    knobs = LamdaKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"B": "m × r, at first", "S": "r × r"}, "frozen": {"A": "r × n", "start": "m × r, r"}}
    product = ("B", "S", "A")
    remark = (
        "The release lacks the paper's spectral start and gradual freezing; order and pace of freezing are our reading."
        " Counts what is trained at the start; r² numbers are still trained at the end."
    )

    def check(self, layer: Layer, knobs: LamdaKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: LamdaKnobs) -> int:
        return knobs.r**2 + knobs.r * layer.m

    def rank(self, layer: Layer, knobs: LamdaKnobs) -> int:
        return knobs.r

    def derived(self, knobs: LamdaKnobs) -> tuple[str, ...]:
        return ("A", "start_b")

    def init(self, start: Start, knobs: LamdaKnobs) -> Tensors:
        from lab import svd

        U, S, Vh = svd.basis(start.weight(), knobs.r)
        return Tensors({"B": U, "S": S.diag()}, {"A": Vh, "start_b": U, "start_s": S})

    def stage(self, knobs: LamdaKnobs, step: int, steps: int) -> int:
        """How many of B's columns still train."""
        over = knobs.freeze * steps
        return max(0, knobs.r - int(knobs.r * step / over)) if over else 0

    def staged(self, t: Mapping[str, torch.Tensor], stage: int, knobs: LamdaKnobs) -> Mapping[str, torch.Tensor]:
        import torch

        B = t["B"]
        live = torch.cat((B[:, :stage], B[:, stage:].detach()), dim=1) if stage else B.detach()
        return {**t, "B": live}

    def factors(self, t: Mapping[str, torch.Tensor], knobs: LamdaKnobs, layer: Layer) -> Any:
        """B·S − B₀·S₀ = (B − B₀)·S + B₀·(S − S₀): no difference of large products, which half precision would spoil."""
        left = (t["B"] - t["start_b"]) @ t["S"] + t["start_b"] @ (t["S"] - t["start_s"].diag())
        return left * knobs.scale, t["A"]

    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        from lab.methods._optimizers import StillAdamW

        return StillAdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)


register(Lamda())
