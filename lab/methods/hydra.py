"""Hydra: a parallel low-rank branch, and a sequential one on the layer's own output (Kim et al. 2023, arXiv 2309.06922).

W' = W + s·(B_p·A_p + B_s·A_s·W): A_p (r×n), B_p (m×r) as in LoRA, A_s (r×m), B_s (m×r) after the layer. Official code:
github.com/extremebird/Hydra (commit b8f5a11), vtab1k/hydra.py (`Hydra_layer`, `reparameterize`) and
elevater/vision_benchmark/evaluation/Hydra_model.py (A ~ N(0, 0.02²), B = 0, as here). The code's branches also have
biases, and its sequential branch sees W·x + b; here the branches act on W alone, so that the update merges into W and
a layer's bias stays its own.
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
class HydraKnobs(Knobs):
    r: int = knob(2, "Rank of each of the two branches.", low=1, size=True)
    scale: float = knob(1.0, "Factor of both branches.", low=1e-6)


class Hydra(OwnMethod):
    """Hydra: HydraConfig(r, scale)."""

    id, name = "hydra", "Hydra"
    paper = Paper("Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", "2309.06922")
    kind = "weight update"
    summary = "A LoRA beside the layer and a LoRA behind it, both merged into the weight."
    equation = r"\Delta W = s\,(B_p A_p + B_s A_s W)"
    knobs = HydraKnobs
    learning_rate = 1e-3
    low_rank = True
    uses_weight = True
    tensors = {"trained": {"A_p": "r × n", "B_p": "m × r", "A_s": "r × m", "B_s": "m × r"}, "frozen": {"W": "m × n"}}
    remark = "The released code's branches have biases, and its second branch sees the layer's bias; here the bias is left alone."

    def count_layer(self, layer: Layer, knobs: HydraKnobs) -> int:
        return knobs.r * (layer.m + layer.n) + 2 * knobs.r * layer.m

    def rank(self, layer: Layer, knobs: HydraKnobs) -> int:
        return min(2 * knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: HydraKnobs) -> Tensors:
        m, n, r = start.layer.m, start.layer.n, knobs.r
        down = {"A_p": start.randn(r, n, scale=0.02), "A_s": start.randn(r, m, scale=0.02)}
        return Tensors(down | {"B_p": start.zeros(m, r), "B_s": start.zeros(m, r)})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: HydraKnobs, layer: Layer) -> Any:
        import torch

        return torch.cat((t["B_p"], t["B_s"]), dim=1) * knobs.scale, torch.cat((t["A_p"], t["A_s"] @ t["weight"]))


register(Hydra())
