"""PiSSA, OLoRA and LoRA-GA: LoRA started from the weight or its gradient, with PEFT's own start.

PEFT takes the start value off the base weight (W ← W − s·B₀·A₀) and keeps only B and A: the shared base is changed,
and the file fits no other. Here the same start is taken off in the update, ΔW = s·(B·A − B₀·A₀): the same numbers
at every step, W untouched, files that load, and an exact export of rank 2r. The start itself is PEFT's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.builtin_lora import LoraKnobs
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Layer, Paper

if TYPE_CHECKING:
    import torch


class Started(OwnMethod):
    """LoRA from a start that is not zero, taken off in the update."""

    own = False
    kind = "initialisation"
    knobs = LoraKnobs
    low_rank = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {"B₀": "m × r", "A₀": "r × n", "W": "m × n"}}
    remark = "PEFT takes the start off the base weight; the lab takes it off in the update, so the base stays as it is."
    start_name = ""

    def options(self) -> dict[str, Any]:
        return {}

    def check(self, layer: Layer, knobs: LoraKnobs) -> None:
        if knobs.r > min(layer.m, layer.n):
            raise LabError(f"r is {knobs.r}, but layer {layer.name} is {layer.m}×{layer.n}: lower r.")

    def count_layer(self, layer: Layer, knobs: LoraKnobs) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: LoraKnobs) -> int:
        return min(2 * knobs.r, layer.m, layer.n)

    def derived(self, knobs: LoraKnobs) -> tuple[str, ...]:
        return ("start_b", "start_a")

    def shapes(self, layer: Layer, knobs: LoraKnobs) -> dict[str, tuple[int, ...]]:
        return {"start_b": (layer.m, knobs.r), "start_a": (knobs.r, layer.n)}

    def trained_shapes(self, layer: Layer, knobs: LoraKnobs) -> dict[str, tuple[int, ...]]:
        return {"b": (layer.m, knobs.r), "a": (knobs.r, layer.n)}

    def init(self, start: Start, knobs: LoraKnobs) -> Tensors:
        from lab.methods import _peft_support as support

        b, a = support.start_of(start, self.start_name, knobs.r, knobs.alpha or knobs.r, self.options())
        return Tensors({"b": b, "a": a}, {"start_b": b, "start_a": a})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: LoraKnobs, layer: Layer) -> Any:
        """s·(B·A − B₀·A₀) as [B−B₀, B₀]·[A; A−A₀]: exactly zero at the start."""
        from lab.methods._layer import stacked

        s = (knobs.alpha or knobs.r) / knobs.r
        left, right = stacked(t["b"] - t["start_b"], t["start_b"], t["a"], t["a"] - t["start_a"])
        return left * s, right


class Pissa(Started):
    id, name, order = "pissa", "PiSSA", 26
    paper = Paper(
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", "2404.02948"
    )
    summary = "LoRA started as the weight's largest singular triplets."
    equation = r"\Delta W = s(BA - B_0A_0),\quad B_0 = U_r\Sigma_r^{1/2},\ A_0 = \Sigma_r^{1/2}V_r^\top"
    start_name = "pissa"


class Olora(Started):
    id, name, order = "olora", "OLoRA", 26
    paper = Paper("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", "2406.01775")
    summary = "LoRA started from the QR factorisation of the weight."
    equation = r"\Delta W = s(BA - B_0A_0),\quad B_0 = Q_r,\ A_0 = R_r,\ W = QR"
    start_name = "olora"


class LoraGa(Started):
    id, name, order = "lora-ga", "LoRA-GA", 28
    paper = Paper("LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "2407.05000")
    summary = "LoRA started from the singular vectors of the first full gradient."
    equation = (
        r"\Delta W = s(BA - B_0A_0),\quad A_0 \propto V_{1:r}^\top,\ B_0 \propto U_{r+1:2r}\ \text{of}\ \nabla_W L"
    )
    needs = "gradient"
    start_name = "lora_ga"

    def options(self) -> dict[str, Any]:
        from peft.tuners.lora.config import LoraGAConfig

        return {"lora_ga_config": LoraGAConfig()}

    def check(self, layer: Layer, knobs: LoraKnobs) -> None:
        if 2 * knobs.r > min(layer.m, layer.n):
            raise LabError(
                f"LoRA-GA takes 2r singular vectors: r is {knobs.r}, layer {layer.name} {layer.m}×{layer.n}."
            )


for row in (Pissa, Olora, LoraGa):
    register(row())
