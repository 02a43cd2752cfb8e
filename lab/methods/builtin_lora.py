"""LoRA, and the methods that change its start, its scale, its optimizer or its trained half, as PEFT has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.builtin import PeftMethod
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


@dataclass
class LoraKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    alpha: float = knob(0.0, "The update is scaled by alpha/r; 0 means alpha = r.", low=0)
    dropout: float = knob(0.0, "Share of inputs dropped in training.", low=0, high=0.9)


class Lora(PeftMethod):
    """LoRA, and the base of the rows that are LoRA with one thing changed."""

    id, name, order = "lora", "LoRA", 1
    paper = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
    kind = "weight update"
    summary = "Adds a product of two thin trained matrices to each frozen weight."
    equation = r"\Delta W = \tfrac{\alpha}{r} B A"
    knobs = LoraKnobs
    low_rank = True
    conv = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {"W": "m × n"}}
    options: dict[str, Any] = {}

    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        from peft import LoraConfig

        alpha = knobs.alpha or knobs.r
        return LoraConfig(
            r=knobs.r, lora_alpha=alpha, lora_dropout=knobs.dropout, target_modules=targets, **self.options
        )

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


class RsLora(Lora):
    id, name, order = "rslora", "rsLoRA", 20
    paper = Paper("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "2312.03732")
    kind = "optimizer"
    summary = "LoRA scaled by alpha/√r, so that the gradient does not shrink as the rank grows."
    equation = r"\Delta W = \tfrac{\alpha}{\sqrt r} B A"
    options = {"use_rslora": True}


class Dora(Lora):
    id, name, order = "dora", "DoRA", 21
    paper = Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353")
    summary = "LoRA on the weight's direction, with a trained length of every output row."
    equation = r"W' = \mathrm{diag}(g)\,\frac{W + sBA}{\lVert W + sBA\rVert_{\mathrm{row}}}"
    low_rank = False
    tensors = {"trained": {"B": "m × r", "A": "r × n", "g": "m"}, "frozen": {"W": "m × n"}}
    options = {"use_dora": True}
    remark = "On convolutions PEFT takes the norm over the output channels too."

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n) + layer.m

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(layer.m, layer.n)


class Orthogonal(Lora):
    id, name, order = "lora-orthogonal", "LoRA, orthogonal start", 29
    paper = Paper("Orthogonal start of LoRA in PEFT", "https://huggingface.co/docs/peft/developer_guides/lora")
    kind = "initialisation"
    conv = False
    summary = "LoRA whose two factors start as disjoint rows of one random orthogonal matrix, their product zero."
    equation = r"\Delta W = s\,BA,\quad B_0 A_0 = 0,\ A_0A_0^\top \propto I"
    options = {"init_lora_weights": "orthogonal"}
    remark = "The rank must be even."

    def check(self, layer: Layer, knobs: Any) -> None:
        if knobs.r % 2:
            raise LabError(f"{self.name} needs an even r, got {knobs.r}.")


@dataclass
class LoraPlusKnobs(LoraKnobs):
    ratio: float = knob(16.0, "Learning rate of B over that of A.", low=1)


class LoraPlus(Lora):
    id, name, order = "lora-plus", "LoRA+", 22
    learning_rate = 0.0005
    paper = Paper("LoRA+: Efficient Low Rank Adaptation of Large Models", "2402.12354")
    kind = "optimizer"
    summary = "LoRA whose second factor learns faster than its first."
    equation = r"\Delta W = sBA,\quad \eta_B = \lambda\,\eta_A"
    knobs = LoraPlusKnobs
    default_ratio = 16.0

    def attach(self, model: Any, knobs: Any, targets: Any, **kwargs: Any) -> Any:
        made = super().attach(model, knobs, targets, **kwargs)
        config: Any = made.peft_config[kwargs.get("adapter_name", "default")]
        config.loraplus_ratio = knobs.ratio
        return made

    def optimizer(self, model: Any, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        import torch
        from peft.optimizers import create_loraplus_optimizer

        ratio = getattr(model.active_peft_config, "loraplus_ratio", self.default_ratio)
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay
        )


class FfaLora(Lora):
    id, name, order = "ffa-lora", "FFA-LoRA", 24
    paper = Paper("Improving LoRA in Privacy-preserving Federated Learning", "2403.12313")
    summary = "LoRA with the first factor frozen at its random start."
    tensors = {"trained": {"B": "m × r"}, "frozen": {"A": "r × n", "W": "m × n"}}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * layer.m

    def finish(self, model: Any, adapter_name: str, knobs: Any, statistics: Any) -> None:
        for name, parameter in model.named_parameters():
            if f".lora_A.{adapter_name}." in name:
                parameter.requires_grad_(False)


class LoraFa(FfaLora):
    id, name, order = "lora-fa", "LoRA-FA", 23
    paper = Paper("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", "2308.03303")
    kind = "optimizer"
    summary = "LoRA with the first factor frozen, and the second's gradient corrected for it."
    equation = r"\Delta W = sBA,\quad g_B \leftarrow s^{-2}\, g_B (AA^\top)^{-1}"

    def optimizer(self, model: Any, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        from peft.optimizers import create_lorafa_optimizer

        config = model.active_peft_config
        return create_lorafa_optimizer(model, config.r, config.lora_alpha, lr, weight_decay=weight_decay)


@dataclass
class EvaKnobs(LoraKnobs):
    rho: float = knob(1.0, "How far ranks may move between layers: a layer gets at most rho·r; 1 keeps them.", low=1)


class Eva(Lora):
    id, name, order = "eva", "EVA", 27
    paper = Paper("Parameter Efficient Fine-tuning via Explained Variance Adaptation", "2410.07170")
    kind = "initialisation"
    conv = False
    needs = "activations"
    summary = "LoRA whose first factor starts as the principal directions of the layer's inputs."
    equation = r"\Delta W = sBA,\quad A_0 = V_r^\top \text{ of } X = U\Sigma V^\top,\ B_0 = 0"
    knobs = EvaKnobs
    remark = (
        "With rho above 1 ranks move between layers of other shapes: the count is then that of rho = 1, an estimate."
    )

    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        from peft import EvaConfig, LoraConfig

        return LoraConfig(
            r=knobs.r,
            lora_alpha=knobs.alpha or knobs.r,
            lora_dropout=knobs.dropout,
            target_modules=targets,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=knobs.rho, use_label_mask=False),
        )

    def attach(self, model: Any, knobs: Any, targets: Any, *, calibrate: Any = None, **kwargs: Any) -> Any:
        made = super().attach(model, knobs, targets, calibrate=calibrate, **kwargs)
        from lab.methods import _peft_support as support

        support.start_eva(made, kwargs.get("adapter_name", "default"), calibrate, kwargs.get("seed", 0))
        return made


@dataclass
class AdaLoraKnobs(Knobs):
    init_r: int = knob(6, "Rank while training starts.", low=1, size=True)
    target_r: int = knob(4, "Average rank that is kept.", low=1)
    warmup: float = knob(0.1, "Share of the steps before ranks are taken away.", low=0, high=0.8)
    final: float = knob(0.3, "Share of the steps after it.", low=0, high=0.8)
    every: int = knob(10, "Steps between two allocations.", low=1)
    orthogonal: float = knob(0.1, "Weight of the penalty that keeps both factors orthogonal.", low=0)


class AdaLora(PeftMethod):
    """AdaLoRA: `after_step` needs the gradients of the step just made, so clear them after it."""

    id, name, order = "adalora", "AdaLoRA", 25
    paper = Paper("AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512")
    kind = "rank allocation"
    summary = "An SVD-shaped update whose least important directions are taken away during training."
    equation = r"\Delta W = s\,P\,\mathrm{diag}(\lambda)\,Q,\quad P^\top P \approx QQ^\top \approx I"
    knobs = AdaLoraKnobs
    alone = True
    low_rank = True
    conv = True
    tensors = {"trained": {"P": "m × r", "λ": "r", "Q": "r × n"}, "frozen": {"W": "m × n"}}

    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        from peft import AdaLoraConfig

        made: Any = AdaLoraConfig(
            init_r=knobs.init_r,
            target_r=knobs.target_r,
            lora_alpha=knobs.init_r,
            deltaT=knobs.every,
            total_step=10**9,
            orth_reg_weight=knobs.orthogonal,
            target_modules=targets,
        )
        made.shares = (knobs.warmup, knobs.final)
        return made

    def check(self, layer: Layer, knobs: Any) -> None:
        if knobs.target_r > knobs.init_r:
            raise LabError(
                f"target_r is {knobs.target_r}, more than init_r {knobs.init_r}: AdaLoRA only takes ranks away."
            )

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.init_r * (layer.m + layer.n + 1)

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.init_r, layer.m, layer.n)

    def penalty(self, model: Any) -> torch.Tensor | None:
        from lab.methods import _peft_support as support

        return support.orthogonality(model, model.active_adapter, model.active_peft_config.orth_reg_weight)

    def after_step(self, model: Any, step: int, steps: int) -> None:
        from lab.methods import _peft_support as support

        support.allocate_ranks(model, step, steps)

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        from lab.methods import _peft_support as support

        return support.allocator_state(model)

    def load_state(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        from lab.methods import _peft_support as support

        support.load_allocator_state(model, state)


for row in (Lora, RsLora, Dora, Orthogonal, LoraPlus, LoraFa, FfaLora, Eva, AdaLora):
    register(row())
