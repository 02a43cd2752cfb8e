"""CoCoOp (Zhou et al., CVPR 2022, arXiv 2203.05557, equation 3): a context that depends on the picture.

v_m(x) = v_m + h(f(x)), h: d → d/16 → d_text with a ReLU (the meta-net), f(x) of length 1. Official code: 4 tokens started
from "a photo of a", SGD lr 2e-3, batch 1, 10 epochs, cosine after a warm-up epoch at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import ClipMethod, Recipe, register
from lab.methods.clip.coop import WARMUP, leading_words, start
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head

TEXTS_AT_ONCE = 1024


@dataclass
class CoCoOpKnobs(Knobs):
    tokens: int = knob(4, "Learned context tokens.", low=1, high=64)
    reduction: int = knob(16, "The meta-net's hidden width is the feature's divided by this.", low=1)


class CoCoOp(ClipMethod):
    id, name, order = "cocoop", "CoCoOp", 22
    paper = Paper("Conditional Prompt Learning for Vision-Language Models", "2203.05557")
    code = "https://github.com/KaiyangZhou/CoOp"
    summary = "A small network shifts CoOp's context by what is in the picture."
    equation = r"v_m(x) = v_m + h(f(x))"
    departures = (
        "The context starts from the template's own first words, where it has enough of them.",
        "Batches of 8 in the short recipe (official: 1); features are computed once for a few random crops.",
        WARMUP,
        "Validation chooses the stopping step.",
    )
    knobs = CoCoOpKnobs
    short = Recipe((2e-3,), steps=40, batch=8)
    published = Recipe((2e-3,), epochs=10, batch=1, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def build(self, episode: Episode, knobs: CoCoOpKnobs) -> Head:
        import torch

        from lab.clip.episode import Head
        from lab.clip.towers import prompted

        context = start(episode, knobs.tokens, leading_words(episode))
        width = episode.zero_shot.shape[1]
        hidden = max(1, width // knobs.reduction)
        down, up = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, context.shape[1])
        trained = {"context": context, "down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
        prompts = prompted(episode.clip, episode.classes, knobs.tokens)
        return Head(knobs, trained, clip=episode.clip, prompts=prompts).to(episode.clip.device)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch

        classes = len(head["prompts"].ends)
        at_once = max(1, TEXTS_AT_ONCE // classes)  # every picture has texts of its own: b · c of them
        return torch.cat([self._logits(head, part) for part in batch.features.split(at_once)])

    def _logits(self, head: Head, features: torch.Tensor) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        from lab.clip.towers import prompt_features, unit

        prompts, clip = head["prompts"], head["clip"]
        shift = F.linear(F.relu(F.linear(features, head["down"], head["down_bias"])), head["up"], head["up_bias"])
        b, c = len(features), len(prompts.ends)
        context = (head["context"] + shift[:, None]).repeat_interleave(c, 0)  # (b · c, m, d)
        before, after = prompts.before.repeat(b, 1, 1), prompts.after.repeat(b, 1, 1)
        texts = prompt_features(clip, torch.cat([before, context, after], 1), prompts.ends.repeat(b))
        with torch.autocast(features.device.type, enabled=False):
            return clip.scale * torch.einsum("be,bce->bc", features, unit(texts).unflatten(0, (b, c)))


register(CoCoOp())
