"""DV-LoRA, dynamic vector-based LoRA: EndoDAC's adapter (Cui et al. 2024, arXiv 2405.08672).

ΔW = s·diag(v)·B·diag(u)·A with u (r), v (m): for a warm-up A and B train and the vectors rest; then the vectors train
and A and B rest. Official code: github.com/BeileiCui/EndoDAC (commit 797cf99), models/backbones/mylora/layers.py (`DVLinear`: A as
LoRA's, B = 0, u, v uniform in ±1 by kaiming_uniform on a single column, alpha = r) and models/endodac/layers.py
(`mark_only_part_as_trainable`), with a warm-up of 20000 steps. There the vectors are not in the optimizer, which is made
of what trains at the start, so that after the warm-up nothing of the adapter learns; here they do, as the paper means it.
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
class DvLoraKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    warmup: float = knob(
        0.5, "Share of the steps in which the matrices train; the vectors train in the rest.", low=0, high=1
    )
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)


class DvLora(OwnMethod):
    """DV-LoRA: DvloraConfig(r, warmup, scale)."""

    id, name = "dv-lora", "DV-LoRA"
    paper = Paper(
        "EndoDAC: Efficient Adapting Foundation Model for Self-Supervised Depth Estimation from Any Endoscopic Camera",
        "2405.08672",
    )
    kind = "weight update"
    summary = "LoRA with two scaling vectors: the matrices train first, then the vectors alone."
    equation = r"\Delta W = s\,\mathrm{diag}(v)\, B\, \mathrm{diag}(u)\, A"
    knobs = DvLoraKnobs
    learning_rate = 3e-3
    low_rank = True
    tensors = {"trained": {"v": "m", "B": "m × r", "u": "r", "A": "r × n"}, "frozen": {}}
    remark = "In the released code the vectors never reach the optimizer; here they train after the warm-up, as the paper says."

    def count_layer(self, layer: Layer, knobs: DvLoraKnobs) -> int:
        return knobs.r * (layer.m + layer.n) + knobs.r + layer.m

    def rank(self, layer: Layer, knobs: DvLoraKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: DvLoraKnobs) -> Tensors:
        m, n, r = start.layer.m, start.layer.n, knobs.r
        vectors = {"u": start.kaiming(r, 1)[:, 0], "v": start.kaiming(m, 1)[:, 0]}
        return Tensors({"B": start.zeros(m, r), "A": start.kaiming(r, n)} | vectors)

    def stage(self, knobs: DvLoraKnobs, step: int, steps: int) -> str:
        return "matrices" if step < knobs.warmup * steps else "vectors"

    def staged(self, t: Mapping[str, torch.Tensor], stage: str, knobs: DvLoraKnobs) -> Mapping[str, torch.Tensor]:
        resting = ("u", "v") if stage == "matrices" else ("A", "B")
        return {name: value.detach() if name in resting else value for name, value in t.items()}

    def factors(self, t: Mapping[str, torch.Tensor], knobs: DvLoraKnobs, layer: Layer) -> Any:
        return t["v"][:, None] * t["B"] * knobs.scale, t["u"][:, None] * t["A"]


register(DvLora())
