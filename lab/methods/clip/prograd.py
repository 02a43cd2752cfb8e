"""ProGrad (Zhu et al., ICCV 2023, arXiv 2205.14865, equation 4): CoOp that never steps against zero-shot knowledge.

With g_d the gradient of the cross-entropy and g_g that of KL(zero-shot ‖ prompt): g = g_d where g_d·g_g ≥ 0, else
g_d − λ·(g_d·g_g / ‖g_g‖²)·g_g, λ = 1. Official code: 16 tokens that start as the template's words with zeros before them,
temperature 1, SGD lr 2e-3, batch 32, configurations of 50, 100 and 200 epochs, cosine after a warm-up epoch at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import BY_SHOTS, Recipe, register
from lab.methods.clip.coop import WARMUP, CoOp, CoOpKnobs, leading_words
from lab.methods.spec import Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


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
    departures = (
        "The words are the template's own up to the class; the official code has templates of its own that end with it.",
        "Features are computed once for a few random crops; validation chooses the stopping step.",
        WARMUP,
    )
    published = Recipe((2e-3,), epochs=BY_SHOTS, batch=32, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def __init__(self) -> None:
        self.id, self.name, self.order, self.knobs = "prograd", "ProGrad", 24, ProGradKnobs

    def build(self, episode: Episode, knobs: CoOpKnobs) -> Head:
        import torch

        from lab.clip.towers import word_embeddings

        head = super().build(episode, knobs)
        words = leading_words(episode)
        count = next((n for n in range(knobs.tokens, 0, -1) if word_embeddings(episode.clip, words, n) is not None), 0)
        if not knobs.words and count:
            with torch.no_grad():
                head["context"].zero_()
                head["context"][-count:] = word_embeddings(episode.clip, words, count)
        return head

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
