"""CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544, equations 4–6): a bottleneck on the image feature.

f' = γ·ReLU(W2·ReLU(W1·f)) + (1 − γ)·f, W1 ∈ R^{d/4×d}, W2 ∈ R^{d×d/4}, no biases; γ = 0.2. The official code feeds the
raw feature; the feature of length 1 here gives the same classifier, because f' grows with f and is normalised after.
The released code comes without a configuration; the recipe here is that of CoOp, on whose code it is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import BY_SHOTS, ClipMethod, Recipe, register
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


@dataclass
class ClipAdapterKnobs(Knobs):
    ratio: float = knob(0.2, "Share of the adapted feature (γ).", low=0.0, high=1.0)
    reduction: int = knob(4, "The bottleneck is the feature's width divided by this.", low=1)


class ClipAdapter(ClipMethod):
    id, name, order = "clip-adapter", "CLIP-Adapter", 12
    paper = Paper("CLIP-Adapter: Better Vision-Language Models with Feature Adapters", "2110.04544")
    code = "https://github.com/gaopengcuhk/CLIP-Adapter"
    summary = "A small bottleneck network mixed into the image feature."
    equation = r"f' = \gamma\,\mathrm{ReLU}(W_2\,\mathrm{ReLU}(W_1 f)) + (1-\gamma) f"
    departures = (
        "Trained by CoOp's recipe, because the released code comes without its configuration.",
        "Features are computed once for a few random crops; validation chooses the stopping step.",
    )
    knobs = ClipAdapterKnobs
    short = Recipe((5e-3,), steps=200, batch=64)
    published = Recipe((2e-3,), epochs=BY_SHOTS, batch=32, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def build(self, episode: Episode, knobs: ClipAdapterKnobs) -> Head:
        import torch

        from lab.clip.episode import Head

        width = episode.train.features.shape[1]
        hidden = max(1, width // knobs.reduction)
        down, up = (
            torch.nn.init.kaiming_uniform_(torch.empty(s), a=5**0.5) for s in ((hidden, width), (width, hidden))
        )
        frozen = {"texts": episode.zero_shot}
        return Head(knobs, {"down": down, "up": up}, frozen, clip=episode.clip).to(episode.clip.device)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        from lab.clip.towers import cosine_logits

        features, share = batch.features, head.knobs.ratio
        with torch.autocast(features.device.type, enabled=False):
            adapted = F.relu(F.linear(F.relu(F.linear(features, head["down"])), head["up"]))
            mixed = share * adapted + (1 - share) * features
        return cosine_logits(mixed, head["texts"], head["clip"].scale)


register(ClipAdapter())
