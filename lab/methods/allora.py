"""ALLoRA: LoRA without scale or dropout, its gradients divided by the rows' norms (Huang & Balestriero 2024, arXiv 2410.09692).

ΔW = B·A with B zero at the start. The gradient of each row of A and of B is multiplied by 1/√(‖row‖₂ + 1/η²):
large near zero (η at zero itself, which speeds up B's escape), small for rows that have grown. No official code was found;
the coefficient is the abstract's "inversely proportional to parameters' ℓ2 norm" in the form that public
re-implementations give it: all take 1/√(‖row‖ + 1/η²) with η = 2, most for the rows of both matrices, as here, some of
them once at the start, some for the rows of ΔW. Which of these the paper means is not settled.
The update rule is the plain optimizer's; the factor sits in the gradient. Adam divides a constant factor out again, so
that with it only the factor's change over time counts.
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


@dataclass
class AlloraKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    eta: float = knob(2.0, "Largest factor η of a row's gradient, reached by rows of zero.", low=1e-3)


class Allora(OwnMethod):
    """ALLoRA: AlloraConfig(r, eta)."""

    id, name = "allora", "ALLoRA"
    paper = Paper("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", "2410.09692")
    kind = "optimizer"
    summary = "LoRA without a scale whose rows learn faster the smaller they are."
    equation = r"\Delta W = B A,\qquad \nabla_{\text{row}} \leftarrow \nabla_{\text{row}} \big/ \sqrt{\lVert \text{row} \rVert_2 + 1/\eta^2}"
    knobs = AlloraKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {}}
    remark = (
        "No official code was found. That the rows of both matrices are scaled, and η = 2, follow public"
        " re-implementations, which do not agree: some scale the rows of ΔW instead. Not settled."
    )

    def count_layer(self, layer: Layer, knobs: AlloraKnobs) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: AlloraKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: AlloraKnobs) -> Tensors:
        return Tensors({"B": start.zeros(start.layer.m, knobs.r), "A": start.kaiming(knobs.r, start.layer.n)})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: AlloraKnobs, layer: Layer) -> Any:
        return scaled_gradient(t["B"], knobs.eta), scaled_gradient(t["A"], knobs.eta)


def scaled_gradient(matrix: torch.Tensor, eta: float) -> torch.Tensor:
    """The matrix itself, bit for bit; what flows back to each row is multiplied by 1/√(‖row‖ + 1/η²)."""
    still = matrix.detach()
    factor = (still.norm(dim=1, keepdim=True) + eta**-2).rsqrt()
    return still + factor * (matrix - still)


register(Allora())
