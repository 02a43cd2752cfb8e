"""CP-LoRA: a convolution's kernel changed by a few outer products of four vectors (Minoccheri, Hodgman et al. 2025, arXiv 2508.01772).

ΔK[o, i, y, x] = s·Σ_ρ a_ρ[o]·b_ρ[i]·c_ρ[y]·d_ρ[x], the canonical polyadic form: r·(c_out + c_in + k_h + k_w) trained
numbers instead of LoRA's r·(c_out + c_in·k_h·k_w). Seen as a matrix, of rank r: it leaves as a LoRA. On a linear layer
two vectors are left, and it is LoRA. No official code was found, so that the start is not settled; here a starts at zero, b as LoRA's A, c and d at
random with unit expected norm.
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
class CpLoraKnobs(Knobs):
    r: int = knob(4, "How many outer products are summed: the update's rank.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)


class CpLora(OwnMethod):
    """CP-LoRA: CploraConfig(r, scale)."""

    id, name = "cp-lora", "CP-LoRA"
    paper = Paper(
        "LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation", "2508.01772"
    )
    kind = "weight update"
    summary = "A convolution's kernel changed by a sum of outer products of four vectors; on linear layers it is LoRA."
    equation = r"\Delta K = s \sum_{\rho=1}^{r} a_\rho \circ b_\rho \circ c_\rho \circ d_\rho"
    knobs = CpLoraKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"a": "c_out × r", "b": "r × c_in", "c": "r × k_h", "d": "r × k_w"}, "frozen": {}}
    remark = (
        "Made for convolutions: choose conv among the targets. On linear layers it is plain LoRA. No official code was"
        " found: the vectors' start is ours."
    )

    def count_layer(self, layer: Layer, knobs: CpLoraKnobs) -> int:
        return knobs.r * (layer.out + layer.in_ + sum(layer.kernel or ()))

    def rank(self, layer: Layer, knobs: CpLoraKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: CpLoraKnobs) -> Tensors:
        layer, r = start.layer, knobs.r
        trained = {"a": start.zeros(layer.out, r), "b": start.kaiming(r, layer.in_)}
        if layer.kernel:
            height, width = layer.kernel
            trained |= {"c": start.randn(r, height, scale=height**-0.5), "d": start.randn(r, width, scale=width**-0.5)}
        return Tensors(trained)

    def factors(self, t: Mapping[str, torch.Tensor], knobs: CpLoraKnobs, layer: Layer) -> Any:
        A = t["b"]  # (r, c_in), then (r, c_in, k_h, k_w)
        if layer.kernel:
            A = A[:, :, None, None] * t["c"][:, None, :, None] * t["d"][:, None, None, :]
        return t["a"] * knobs.scale, A.reshape(A.shape[0], -1)


register(CpLora())
