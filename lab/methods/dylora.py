"""DyLoRA: one LoRA trained for every rank up to r (Valipour et al. 2022, arXiv 2210.07558).

Each step draws b from {r_min, …, r} and sees B_b = B[:, :b], A_b = A[:b]: ΔW = (alpha/b)·B_b·A_b. Afterwards any rank b
can be cut out. With `frozen`, only the b-th column and row learn in that step (the paper's first variant). Official
code: huawei-noah/KD-NLP, DyLoRA/loralib (class `dynamic`, read in a public copy, since the repository itself could not
be: both factors cut and multiplied by √(r/b), times alpha/r); one rank for all layers in a step, as there. scale is alpha/r, so that the uncut update is s·B·A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class DyloraKnobs(Knobs):
    r: int = knob(8, "Largest rank.", low=1, size=True)
    r_min: int = knob(1, "Smallest rank that training draws.", low=1)
    keep: int = knob(0, "Rank that is used outside training; 0: the largest.", low=0)
    frozen: bool = knob(False, "In a step, train only the last row and column that the drawn rank sees.")
    scale: float = knob(1.0, "Factor of the uncut update (LoRA's alpha / r).", low=1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r_min", "keep"):
            if getattr(self, name) > self.r:
                raise LabError(f"{name} must be at most r = {self.r}, got {getattr(self, name)}.")


class Dylora(OwnMethod):
    """DyLoRA: DyloraConfig(r, r_min, keep, frozen, scale)."""

    id, name = "dylora", "DyLoRA"
    paper = Paper(
        "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
        "2210.07558",
    )
    kind = "rank allocation"
    summary = "A LoRA that each step trains at a random rank, so that it can be cut to any rank afterwards."
    equation = r"\Delta W = s\,\frac{r}{b}\, B_{:,:b} A_{:b,:},\qquad b \sim \mathcal{U}\{r_{\min}, \dots, r\} \text{ each step}"
    knobs = DyloraKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {}}
    remark = "A step's rank is the same in all layers and in every run: a function of the step alone."

    def count_layer(self, layer: Layer, knobs: DyloraKnobs) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: DyloraKnobs) -> int:
        return min(knobs.keep or knobs.r, layer.m, layer.n)

    def init(self, start: Start, knobs: DyloraKnobs) -> Tensors:
        return Tensors({"B": start.zeros(start.layer.m, knobs.r), "A": start.kaiming(knobs.r, start.layer.n)})

    def stage(self, knobs: DyloraKnobs, step: int, steps: int) -> int:
        from lab import counter

        return knobs.r_min + counter.key("dylora", step) % (knobs.r - knobs.r_min + 1)

    def staged(self, t: Mapping[str, torch.Tensor], stage: int, knobs: DyloraKnobs) -> Mapping[str, torch.Tensor]:
        import torch

        B, A = t["B"][:, :stage], t["A"][:stage]
        if knobs.frozen:
            B = torch.cat((B[:, : stage - 1].detach(), B[:, stage - 1 :]), dim=1)
            A = torch.cat((A[: stage - 1].detach(), A[stage - 1 :]))
        return {"B": B, "A": A, "cut": A}

    def factors(self, t: Mapping[str, torch.Tensor], knobs: DyloraKnobs, layer: Layer) -> Any:
        used = t["A"].shape[0] if "cut" in t else (knobs.keep or knobs.r)
        return t["B"][:, :used] * (knobs.scale * knobs.r / used), t["A"][:used]


register(Dylora())
