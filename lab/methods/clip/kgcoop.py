"""KgCoOp (Yao et al., CVPR 2023, arXiv 2303.13283, equations 3–5): CoOp held near the hand-written prompts.

loss = cross-entropy + λ·mean_c ‖w_c − w_c^clip‖², λ = 8. Official code: 4 tokens started from "a photo of a", SGD lr 2e-3,
batch 128, 100 epochs, cosine after a warm-up epoch at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import Recipe, register
from lab.methods.clip.coop import WARMUP, CoOp, CoOpKnobs, leading_words
from lab.methods.spec import Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


@dataclass
class KgCoOpKnobs(CoOpKnobs):
    tokens: int = knob(4, "Learned context tokens.", low=1, high=64)
    weight: float = knob(8.0, "Weight of the distance to the hand-written prompts (λ).", low=0.0)


class KgCoOp(CoOp):
    paper = Paper("Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", "2303.13283")
    code = "https://github.com/htyao89/KgCoOp"
    summary = "CoOp with a penalty on the distance to the hand-written prompts' features."
    equation = r"\mathcal{L}_{ce} + \lambda \tfrac1C \sum_c \lVert w_c - w_c^{clip} \rVert^2"
    departures = (
        "As in the official code the penalty is λ·mean(1 − cos), half the paper's squared distance of unit vectors.",
        "The context starts from the template's own first words, where it has enough of them.",
        "Features are computed once for a few random crops; validation chooses the stopping step.",
        WARMUP,
    )
    published = Recipe((2e-3,), epochs=100, batch=128, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def __init__(self) -> None:
        self.id, self.name, self.order, self.knobs = "kgcoop", "KgCoOp", 23, KgCoOpKnobs

    def build(self, episode: Episode, knobs: CoOpKnobs) -> Head:
        import dataclasses

        return super().build(episode, dataclasses.replace(knobs, words=knobs.words or leading_words(episode)))

    def loss(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch.nn.functional as F

        from lab.clip.towers import cosine_logits, unit

        texts = self.texts(head)
        logits = cosine_logits(batch.features, texts, head["clip"].scale)
        distance = 1 - (unit(texts) * head["texts"]).sum(1)
        return F.cross_entropy(logits, batch.labels) + head.knobs.weight * distance.mean()


register(KgCoOp())
