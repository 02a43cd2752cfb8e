"""ProGrad (Zhu et al., ICCV 2023, arXiv 2205.14865, equation 4): CoOp that never steps against zero-shot knowledge.

With g_d the gradient of the cross-entropy and g_g that of KL(zero-shot ‖ prompt): g = g_d where g_d·g_g ≥ 0, else
g_d − λ·(g_d·g_g / ‖g_g‖²)·g_g, λ = 1. Official code: 16 tokens, temperature 1, SGD lr 2e-3, batch 32, 100 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import Recipe, register
from lab.methods.clip.coop import CoOp, CoOpKnobs
from lab.methods.spec import Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Head


@dataclass
class ProGradKnobs(CoOpKnobs):
    weight: float = knob(1.0, "How much of the conflicting part is taken off (λ).", low=0.0, high=1.0)


def project(task: torch.Tensor, general: torch.Tensor, weight: float) -> torch.Tensor:
    """The task's gradient without the part that points against the general one."""
    direction = general / general.norm().clamp(min=1e-12)
    against = (task * direction).sum().clamp(max=0.0)
    return task - weight * against * direction


class ProGrad(CoOp):
    paper = Paper("Prompt-aligned Gradient for Prompt Tuning", "2205.14865")
    code = "https://github.com/BeierZhu/Prompt-align"
    summary = "CoOp whose gradient loses the part that would undo zero-shot predictions."
    equation = r"g = g_d - \lambda \min(0, g_d \cdot \hat g_g)\, \hat g_g"
    departures = ("Features are computed once for a few random crops; validation chooses the stopping step.",)
    published = Recipe((2e-3,), epochs=100, batch=32, optimizer="sgd", weight_decay=5e-4)

    def __init__(self) -> None:
        self.id, self.name, self.order, self.knobs = "prograd", "ProGrad", 24, ProGradKnobs

    def loss(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        from lab.clip.towers import cosine_logits

        scale, context = head["clip"].scale, head["context"]
        logits = self.logits(head, batch)
        teacher = cosine_logits(batch.features, head["texts"], scale).softmax(1)
        task = F.cross_entropy(logits, batch.labels)
        general = -(teacher * logits.log_softmax(1)).sum(1).mean()  # KL up to the teacher's own entropy
        if not torch.is_grad_enabled():
            return task
        g_task, g_general = (torch.autograd.grad(part, context, retain_graph=True)[0] for part in (task, general))
        gradient = project(g_task, g_general, head.knobs.weight)
        # A scalar of the task's value whose gradient is the projected one: the training loop stays as it is.
        surrogate = (context * gradient).sum()
        return task.detach() + surrogate - surrogate.detach()


register(ProGrad())
