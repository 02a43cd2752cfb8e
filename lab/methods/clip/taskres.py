"""TaskRes (Yu et al., CVPR 2023, arXiv 2211.10277, equation 2): a residual on the text classifier.

t'_c = t_c + α·x_c, t_c as the tower gives it (not of length 1), x ∈ R^{C×d} trained from 0; α = 0.5 (1 for Flowers-102).
Official code: Adam, lr 2e-3 (2e-4 on ImageNet), batch 256, 100 (1 to 4 shots) or 200 epochs, cosine after a warm-up epoch
at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import ClipMethod, Recipe, register
from lab.methods.clip.coop import WARMUP
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


@dataclass
class TaskResKnobs(Knobs):
    alpha: float = knob(0.5, "Factor of the residual.", low=1e-6)


class TaskRes(ClipMethod):
    id, name, order = "taskres", "TaskRes", 13
    paper = Paper("Task Residual for Tuning Vision-Language Models", "2211.10277")
    code = "https://github.com/geekyutao/TaskRes"
    summary = "A trained residual is added to each class's text feature."
    equation = r"t'_c = t_c + \alpha x_c"
    departures = (
        "The regular base only; the official code also offers an enhanced base tuned beforehand.",
        "Features are computed once for a few random crops; validation chooses the stopping step.",
        WARMUP,
    )
    knobs = TaskResKnobs
    short = Recipe((1e-1,), steps=200, batch=64)
    published = Recipe(
        (2e-3,), epochs=((4, 100), (16, 200)), batch=256, optimizer="adam", weight_decay=5e-4, warmup_epochs=1
    )

    def build(self, episode: Episode, knobs: TaskResKnobs) -> Head:
        import torch

        from lab.clip.episode import Head

        texts = episode.text_features
        return Head(knobs, {"residual": torch.zeros_like(texts)}, {"texts": texts}, clip=episode.clip)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        from lab.clip.towers import cosine_logits

        weights = head["texts"] + head.knobs.alpha * head["residual"]
        return cosine_logits(batch.features, weights, head["clip"].scale)


register(TaskRes())
