"""LoRA-Pro: LoRA whose two gradients are corrected towards the full one (Wang et al. 2024, arXiv 2407.18242).

ΔW = s·B·A as in LoRA. Each step the pair of gradients is replaced by the one whose effect on W, s(B·g_A + g_B·A), is
nearest to the full gradient, which needs only the two gradients themselves (`lab/methods/_optimizers.py`, `lora_pro`).
Official code: github.com/mrflogs/LoRA-Pro (commit 2d8f44a), peta/optim.py (`step_full`, `step_efficient`, X_mode "sylvester", damping
1e-8). `full` = false: Adam's moments are of the corrected gradients (the class's default); true: they are of the m×n
gradient the pair stands for (the paper's Algorithm 2), at m·n numbers of memory each. Full mode's weight decay
acts on the adapter here, not on the frozen weight as in the code.
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
class LoraProKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)
    full: bool = knob(False, "Keep Adam's moments of the full m×n gradient: the paper's algorithm, and much memory.")


class LoraPro(OwnMethod):
    """LoRA-Pro: LoraproConfig(r, scale, full)."""

    id, name = "lora-pro", "LoRA-Pro"
    paper = Paper("LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", "2407.18242")
    kind = "optimizer"
    summary = "LoRA with gradients corrected so that its steps come as near to full fine-tuning's as a low rank can."
    equation = r"g_A = \tfrac{1}{s^2}(B^\top B)^{-1}\nabla_A + X A,\quad g_B = \tfrac{1}{s^2}\,(I - B(B^\top B)^{-1}B^\top)\,\nabla_B (A A^\top)^{-1} - B X"
    knobs = LoraProKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {}}
    remark = "The released optimizer's default keeps moments of the corrected gradients; full = true is the paper's Algorithm 2."

    def count_layer(self, layer: Layer, knobs: LoraProKnobs) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: LoraProKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: LoraProKnobs) -> Tensors:
        return Tensors({"B": start.zeros(start.layer.m, knobs.r), "A": start.kaiming(knobs.r, start.layer.n)})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: LoraProKnobs, layer: Layer) -> Any:
        return t["B"] * knobs.scale, t["A"]

    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        from lab.methods._optimizers import LoraProAdamW

        pairs, full = [], False
        for _, site, adapter in self.sites(model):
            t, knobs = site.tensors(adapter), site.knobs[adapter]
            pairs.append((t["A"], t["B"], knobs.scale))
            full = full or knobs.full
        return LoraProAdamW(pairs, lr, weight_decay, full=full)


register(LoraPro())
