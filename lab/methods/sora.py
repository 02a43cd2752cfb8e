"""SoRA: a LoRA whose ranks are gated and driven to zero (Ding et al. 2023, arXiv 2311.11696).

ΔW = s·B·diag(g)·A with a trained gate g (r). After each optimizer step the gate takes a proximal step of an l1
penalty: g ← sign(g)·max(|g| − λ, 0). Ranks whose gate is zero can be dropped. Official code: github.com/TsinghuaC3I/SoRA (commit 7ca93d5),
src/lora.py (g ~ N(0, 1), A as LoRA's, B = 0) and src/sparse_optimizer.py. The paper's threshold is η·λ with η the
learning rate; the code uses λ itself (`sparse_lambda_2`), as here. The code's three lines of in-place thresholding also
zero what lands in (0, λ) after shrinking, i.e. everything up to 2λ; here it is the paper's soft threshold. The code
adds sparse_lambda times the gates' mean magnitude to the loss, which the paper does not have: `l1`, 0 by default.
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
class SoraKnobs(Knobs):
    r: int = knob(8, "Largest rank.", low=1, size=True)
    threshold: float = knob(1e-3, "How much each step shrinks every gate (λ).", low=0)
    l1: float = knob(0.0, "Weight of the gates' mean magnitude in the loss.", low=0)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)


class Sora(OwnMethod):
    """SoRA: SoraConfig(r, threshold, l1, scale)."""

    id, name = "sora", "SoRA"
    paper = Paper("Sparse Low-rank Adaptation of Pre-trained Language Models", "2311.11696")
    kind = "rank allocation"
    summary = (
        "A LoRA with a gate on every rank; each step shrinks the gates, and those that reach zero drop their rank."
    )
    equation = r"\Delta W = s\,B\,\mathrm{diag}(g)\,A,\qquad g \leftarrow \mathrm{sign}(g)\max(|g| - \lambda, 0) \text{ after each step}"
    knobs = SoraKnobs
    learning_rate = 2e-3
    low_rank = True
    tensors = {"trained": {"B": "m × r", "gate": "r", "A": "r × n"}, "frozen": {}}
    remark = "The released code shrinks by λ a step, whatever the learning rate; the paper by λ times it. This is the code's."

    def count_layer(self, layer: Layer, knobs: SoraKnobs) -> int:
        return knobs.r * (layer.m + layer.n) + knobs.r

    def rank(self, layer: Layer, knobs: SoraKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: SoraKnobs) -> Tensors:
        m, n, r = start.layer.m, start.layer.n, knobs.r
        return Tensors({"B": start.zeros(m, r), "gate": start.randn(r), "A": start.kaiming(r, n)})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: SoraKnobs, layer: Layer) -> Any:
        return t["B"] * (t["gate"] * knobs.scale), t["A"]

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        sites = [(site.tensors(a)["gate"], site.knobs[a].l1) for _, site, a in self.sites(model)]
        if not any(l1 for _, l1 in sites):
            return None
        count = sum(gate.numel() for gate, _ in sites)
        return sum((gate.abs().sum() * l1 for gate, l1 in sites), sites[0][0].new_zeros(())) / count

    def after_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        for _, site, adapter in self.sites(model):
            gate = site.tensors(adapter)["gate"]
            gate.data.copy_(soft_threshold(gate.data, site.knobs[adapter].threshold))


def soft_threshold(x: torch.Tensor, by: float) -> torch.Tensor:
    """sign(x)·max(|x| − by, 0): the proximal step of by·‖x‖₁."""
    return x.sign() * (x.abs() - by).clamp_min(0)


register(Sora())
