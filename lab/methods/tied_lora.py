"""Tied-LoRA: one trained LoRA for all layers of a kind, scaled by each layer's own vectors (Renduchintala et al. 2023, arXiv 2311.09578).

ΔW_l = s·diag(v_l)·B·diag(u_l)·A with A (r×n), B (m×r) shared, u_l (r), v_l (m) a layer's own, all trained (the
paper's TL6). A starts as LoRA's, B at zero, u and v at one. The authors' release (github.com/NVIDIA/NeMo, commit 012b7f2,
nemo/collections/nlp/modules/common/megatron/adapters/parallel_adapters.py, `ParallelLinearAdapterWeightTying`) ties A and
B (B zero) and has no u and v, but an optional position embedding: the vectors' start is not settled by it. In the paper
one fused q-k-v projection is adapted, and tied over depth. Here layers are tied that have the same role (q, k, v, …)
and shape, which is the same thing for B, or, with `tie` = shape, all of a shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class TiedLoraKnobs(Knobs):
    r: int = knob(8, "Rank of the update.", low=1, size=True)
    tie: str = knob(
        "role",
        "Which layers share factors: those of one role and shape, or all of one shape.",
        choices=("role", "shape"),
    )
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)


class TiedLora(OwnMethod):
    """Tied-LoRA: TiedloraConfig(r, tie, scale)."""

    id, name = "tied-lora", "Tied-LoRA"
    paper = Paper("Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying", "2311.09578")
    kind = "weight update"
    summary = "One LoRA shared by all layers of a kind, with two trained scaling vectors for each layer."
    equation = r"\Delta W_l = s\,\mathrm{diag}(v_l)\, B\, \mathrm{diag}(u_l)\, A,\qquad A, B \text{ shared}"
    knobs = TiedLoraKnobs
    learning_rate = 1e-3
    low_rank = True
    tensors = {"trained": {"A": "r × n, shared", "B": "m × r, shared", "u": "r", "v": "m"}, "frozen": {}}
    remark = (
        "All four tensors are trained, the paper's variant TL6. The authors' release (NeMo) ties the factors but has no"
        " scaling vectors, so that their start at one is ours."
    )

    def group(self, layer: Layer, knobs: TiedLoraKnobs) -> str:
        role = layer.role if knobs.tie == "role" else ""
        return f"{role or 'all'}_{layer.m}x{layer.n}"

    def count(self, layers: Sequence[Layer], knobs: TiedLoraKnobs) -> int:
        groups = {self.group(layer, knobs): layer for layer in layers}
        shared = sum(knobs.r * (layer.m + layer.n) for layer in groups.values())
        return shared + sum(layer.m + knobs.r for layer in layers)

    def rank(self, layer: Layer, knobs: TiedLoraKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def init_shared(self, layers: list[Layer], knobs: TiedLoraKnobs, start: Start) -> dict[str, torch.Tensor]:
        made = {}
        for group, layer in {self.group(layer, knobs): layer for layer in layers}.items():
            made |= {f"A_{group}": start.kaiming(knobs.r, layer.n), f"B_{group}": start.zeros(layer.m, knobs.r)}
        return made

    def shared_for(self, layer: Layer, knobs: TiedLoraKnobs) -> dict[str, str]:
        return {name: f"{name}_{self.group(layer, knobs)}" for name in ("A", "B")}

    def init(self, start: Start, knobs: TiedLoraKnobs) -> Tensors:
        return Tensors({"u": start.zeros(knobs.r) + 1, "v": start.zeros(start.layer.m) + 1})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: TiedLoraKnobs, layer: Layer) -> Any:
        return t["v"][:, None] * t["B"] * (t["u"] * knobs.scale), t["A"]


register(TiedLora())
