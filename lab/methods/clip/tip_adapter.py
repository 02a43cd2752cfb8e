"""Tip-Adapter (Zhang et al., ECCV 2022, arXiv 2207.09519, equations 3–6): a cache of training features beside the texts.

logits = 100·f·W_cᵀ + α·exp(−β(1 − f·Fᵀ))·L, F the training features, L their one-hot classes; α and β are searched on
validation. The model's own temperature stands for 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods.clip import ClipMethod, register
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head

# The official configurations search 200 × 20 values up to (7..12, 3..50) depending on the dataset.
BETAS = (0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0)
ALPHAS = (0.2, 0.5, 1.0, 2.0, 3.5, 6.0, 10.0, 20.0, 50.0)


@dataclass
class TipKnobs(Knobs):
    alpha: float = knob(0.0, "Weight of the cache; 0: searched on validation pictures.", low=0.0)
    beta: float = knob(0.0, "Sharpness of the cache; 0: searched on validation pictures.", low=0.0)


class TipAdapter(ClipMethod):
    id, name, order = "tip-adapter", "Tip-Adapter", 10
    paper = Paper("Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", "2207.09519")
    code = "https://github.com/gaopengcuhk/Tip-Adapter"
    summary = "Similarity to cached training features is added to the text logits, nothing trained."
    equation = r"\tau f W_c^\top + \alpha \exp(-\beta(1 - f F^\top)) L"
    departures = (
        "α and β from a grid of 9 × 7 values for every dataset, instead of 20 × 200 in ranges set by dataset.",
        "A cache key is the mean of the picture's plain view and its random crops, each of length 1; the official code"
        " averages ten random crops before it normalises.",
    )
    knobs = TipKnobs
    trains = False

    def build(self, episode: Episode, knobs: TipKnobs) -> Head:
        import torch.nn.functional as F

        from lab.clip.episode import Head

        frozen = {
            "cached": episode.train.features,
            "values": F.one_hot(episode.train.labels, len(episode.classes)).float(),
            "texts": episode.zero_shot,
        }
        return self.head(Head, knobs, frozen, episode)

    def head(self, make: type[Head], knobs: TipKnobs, frozen: dict[str, torch.Tensor], episode: Episode) -> Head:
        return make(knobs, frozen=frozen, clip=episode.clip, alpha=knobs.alpha or 1.0, beta=knobs.beta or 5.5)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch

        from lab.clip.towers import cosine_logits

        features = batch.features
        with torch.autocast(features.device.type, enabled=False):
            affinity = features @ head["cached"].T
            cache = torch.exp(-head["beta"] * (1 - affinity)) @ head["values"]
            return cosine_logits(features, head["texts"], head["clip"].scale) + head["alpha"] * cache

    def settle(self, head: Head, episode: Episode) -> dict[str, Any]:
        import torch
        import torch.nn.functional as F

        from lab.clip.episode import Batch

        held, found = episode.validation, []
        for beta in (head.knobs.beta,) if head.knobs.beta else BETAS:
            for alpha in (head.knobs.alpha,) if head.knobs.alpha else ALPHAS:
                head.also |= {"alpha": alpha, "beta": beta}
                with torch.no_grad():
                    logits = self.logits(head, Batch(held.labels, features=held.features))
                accuracy = (logits.argmax(1) == held.labels).float().mean().item()
                found.append((accuracy, -F.cross_entropy(logits, held.labels).item(), alpha, beta))
        _, _, alpha, beta = max(found)
        head.also |= {"alpha": alpha, "beta": beta}
        return {"alpha": alpha, "beta": beta}


register(TipAdapter())
