"""LoRA-SB: LoRA-XS started from the first step of full fine-tuning (Ponkshe et al. 2024, arXiv 2411.19557).

ΔW = B·R·A, with B, A frozen and R (r×r) trained. Let G be the loss's gradient by W on a first batch; full
fine-tuning's first Adam step is −η·sign(G) = U·Σ·Vᵀ. Then B = U_r, A = V_rᵀ and R starts at Σ_r: training starts one
rank-r approximated full step away from the base, and R's gradient is the full gradient's projection (B and A
are orthonormal), so that no scale is left to choose. Official code: github.com/RaghavSinghal10/lora-sb (commit 4cdf68b),
utils/gradient_utils.py (`-1 * lr * torch.sign(grad)`, gradients summed over samples) and train_arithmetic.py
(alpha = r, η = lr / (warm-up steps)); the placement of B, A and R is the paper's Algorithm 1.
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
class LoraSbKnobs(Knobs):
    r: int = knob(8, "Side of the trained square matrix: the update's rank.", low=1, size=True)
    eta: float = knob(1e-5, "Size η of the full step that training starts from.", low=0)


class LoraSb(OwnMethod):
    """LoRA-SB: LorasbConfig(r, eta)."""

    id, name = "lora-sb", "LoRA-SB"
    paper = Paper(
        "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
        "2411.19557",
    )
    kind = "initialisation"
    summary = "LoRA-XS between the singular vectors of the first full fine-tuning step instead of the weight's."
    equation = r"\Delta W = \underbrace{U_r}_{\text{frozen}} R \underbrace{V_r^\top}_{\text{frozen}},\quad -\eta\,\mathrm{sign}(\nabla_W L) \approx U_r \Sigma_r V_r^\top,\ R_0 = \Sigma_r"
    knobs = LoraSbKnobs
    learning_rate = 1e-3
    low_rank = True
    identity_start = False
    needs = "gradient"
    tensors = {"trained": {"R": "r × r"}, "frozen": {"B": "m × r", "A": "r × n"}}
    product = ("B", "R", "A")
    remark = (
        "Starts one step of size η away from the base, as the paper means it. The frozen factors come from data,"
        " so the file holds them too: it is as large as a LoRA's."
    )

    def check(self, layer: Layer, knobs: LoraSbKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: LoraSbKnobs) -> int:
        return knobs.r**2

    def rank(self, layer: Layer, knobs: LoraSbKnobs) -> int:
        return knobs.r

    def shapes(self, layer: Layer, knobs: LoraSbKnobs) -> dict[str, tuple[int, ...]]:
        return {"B": (layer.m, knobs.r), "A": (knobs.r, layer.n)}

    def trained_shapes(self, layer: Layer, knobs: LoraSbKnobs) -> dict[str, tuple[int, ...]]:
        return {"R": (knobs.r, knobs.r)}

    def init(self, start: Start, knobs: LoraSbKnobs) -> Tensors:
        from lab import svd

        assert start.gradient is not None
        U, S, Vh = svd.basis(-start.gradient.sign(), knobs.r, cache=False)  # η scales R alone
        return Tensors({"R": (knobs.eta * S).diag()}, {"B": U, "A": Vh})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: LoraSbKnobs, layer: Layer) -> Any:
        return t["B"] @ t["R"], t["A"]


register(LoraSb())
