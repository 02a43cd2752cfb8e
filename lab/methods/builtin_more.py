"""GLoRA, Super-Tuning and LoRA preconditioned on its manifold. From PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.builtin import PeftMethod
from lab.methods.builtin_factors import RankKnobs
from lab.methods.builtin_lora import Lora, LoraKnobs
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


class Glora(PeftMethod):
    id, name, order = "glora", "GLoRA", 38
    paper = Paper("One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", "2306.07967")
    kind = "weight update"
    summary = "A low-rank change added to the weight, and one multiplied with it entry by entry; biases follow both."
    equation = r"W' = W + W \odot A + B,\quad b' = b + d\,b + e + W C"
    knobs = RankKnobs
    tensors = {
        "trained": {"A, B": "each m × r and r × n", "C": "n × r and r × 1", "d, e": "1, where there is a bias"},
        "frozen": {"W": "m × n"},
    }
    remark = (
        "A, B and C of rank r, d and e single numbers, as PEFT's defaults have it; the paper searches the form of each"
        " layer by layer. PEFT reads the paper's product of W and A entry by entry."
    )
    peft_config = "GloraConfig"

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        bias = knobs.r * (layer.n + 1) + 2 if layer.bias else 0
        return 2 * knobs.r * (layer.m + layer.n) + bias


@dataclass
class SupertuningKnobs(Knobs):
    percent: float = knob(1.0, "Share of the weight's entries that is trained, in percent.", low=0.001, high=100)
    largest: bool = knob(True, "Train the entries of largest magnitude; off, those of smallest.")


class Supertuning(PeftMethod):
    id, name, order = "super-tuning", "Super-Tuning", 57
    paper = Paper("Super-Tuning (sparse fine-tuning of the largest weights)", "2607.09287")
    kind = "sparse"
    summary = "Trains the weight's own entries of largest magnitude."
    equation = r"\Delta W = M \odot S,\quad M_{ij} = 1 \text{ where } |W_{ij}| \text{ is among the largest}"
    knobs = SupertuningKnobs
    tensors = {"trained": {"S": "a share of m·n"}, "frozen": {"M": "as many positions", "W": "m × n"}}
    peft_config = "SupertuningConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"sparsity": self.sparsity(knobs), "select_top": knobs.largest}

    def sparsity(self, knobs: Any) -> float:
        return 1 - knobs.percent / 100

    def check(self, layer: Layer, knobs: Any) -> None:
        if self.count_layer(layer, knobs) < 1:
            raise LabError(
                f"percent is {knobs.percent:g}, which trains no entry of layer {layer.name} ({layer.m}×{layer.n}): raise it."
            )

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return int(layer.m * layer.n * (1.0 - self.sparsity(knobs)))


@dataclass
class RiemannianKnobs(LoraKnobs):
    damping: float = knob(0.01, "Added to both Gram matrices before they are inverted.", low=1e-12, high=1)


class Riemannian(Lora):
    id, name, order = "lora-riemannian", "LoRA, Riemannian steps", 29
    paper = Paper("Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", "2402.02347")
    kind = "optimizer"
    summary = "LoRA whose gradients are divided by the other factor's Gram matrix, so that scales of the two even out."
    equation = r"\Delta W = sBA,\quad g_A \leftarrow (B^\top B + \delta I)^{-1} g_A,\ g_B \leftarrow g_B (AA^\top + \delta I)^{-1}"
    conv = False  # PEFT's preconditioner takes matrices only
    knobs = RiemannianKnobs

    def attach(self, model: Any, knobs: Any, targets: Any, **kwargs: Any) -> Any:
        made = super().attach(model, knobs, targets, **kwargs)
        config: Any = made.peft_config[kwargs.get("adapter_name", "default")]
        config.riemannian_damping = knobs.damping
        return made

    def optimizer(self, model: Any, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        import torch
        from peft.optimizers import create_riemannian_optimizer

        damping = getattr(model.active_peft_config, "riemannian_damping", 0.01)
        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, reg=damping, weight_decay=weight_decay)


for row in (Glora, Supertuning, Riemannian):
    register(row())
