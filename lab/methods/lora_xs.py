"""LoRA-XS: an r×r matrix trained between frozen singular factors (Bałazy et al. 2024, arXiv 2405.17604).

ΔW = s·B·R·A with B = U_r·Σ_r (m×r) and A = V_rᵀ (r×n) from the SVD of W, frozen, and R (r×r) trained, started at
N(0, σ²) with σ = 10⁻⁵. Official code: github.com/MohammadrezaBanaei/LoRA-XS (commit 24efae6), utils/initialization_utils.py
(`get_svd_replacement_module`, `sigma=0.00001`) and utils/latent_utils.py. There the SVD is of Wᵀ, U·Σ goes to `lora_A`
and V to `lora_B`, i.e. Σ sits on the input's side; the paper writes it on the output's, as here. Both reach the same
updates, with differently scaled gradients of R.
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
class LoraXsKnobs(Knobs):
    r: int = knob(8, "Side of the trained square matrix: the update's rank.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)
    sigma: float = knob(1e-5, "Standard deviation of the start; 0 starts exactly at the base model.", low=0)


class LoraXs(OwnMethod):
    """LoRA-XS: LoraxsConfig(r, scale, sigma)."""

    id, name = "lora-xs", "LoRA-XS"
    paper = Paper("LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", "2405.17604")
    kind = "weight update"
    summary = "A trained r×r matrix between the frozen top singular vectors of the weight."
    equation = r"\Delta W = s\,\underbrace{U_r \Sigma_r}_{\text{frozen}}\, R\, \underbrace{V_r^\top}_{\text{frozen}}"
    knobs = LoraXsKnobs
    learning_rate = 3e-3
    low_rank = True
    identity_start = False
    tensors = {"trained": {"R": "r × r"}, "frozen": {"B": "m × r", "A": "r × n"}}
    product = ("B", "R", "A")
    remark = (
        "Starts at the base model up to noise of 1e-5, as the paper does; sigma = 0 removes it and changes nothing else."
        " The authors' code puts the singular values on the other side of R than their paper; this is the paper's form."
    )

    def check(self, layer: Layer, knobs: LoraXsKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: LoraXsKnobs) -> int:
        return knobs.r**2

    def rank(self, layer: Layer, knobs: LoraXsKnobs) -> int:
        return knobs.r

    def derived(self, knobs: LoraXsKnobs) -> tuple[str, ...]:
        return ("B", "A")

    def init(self, start: Start, knobs: LoraXsKnobs) -> Tensors:
        from lab import svd

        U, S, Vh = svd.basis(start.weight(), knobs.r)
        return Tensors({"R": start.randn(knobs.r, knobs.r, scale=knobs.sigma)}, {"B": U * S, "A": Vh})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: LoraXsKnobs, layer: Layer) -> Any:
        return (t["B"] @ t["R"]) * knobs.scale, t["A"]


register(LoraXs())
