"""Tip-Adapter-F (Zhang et al., ECCV 2022, arXiv 2207.09519, section 3.3): Tip-Adapter with its cache keys fine-tuned.

The keys F are trained by cross-entropy with α = 1, β = 5.5 (the paper's initial values), then α and β are searched on
validation. Official code: AdamW, lr 1e-3, eps 1e-4, batch 256, 20 epochs, cosine, α and β started from values set by dataset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.methods.clip import Recipe, register
from lab.methods.clip.tip_adapter import TipAdapter, TipKnobs

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Episode, Head


class TipAdapterF(TipAdapter):
    id, name, order = "tip-adapter-f", "Tip-Adapter-F", 11
    summary = "Tip-Adapter whose cached features are trained."
    departures = (
        *TipAdapter.departures,
        "Training starts from the paper's α and β on every dataset.",
        "The official code keeps the epoch with the best test accuracy and reports the larger of that and the searched"
        " one; here validation pictures choose, and the test set is looked at once.",
    )
    trains = True
    short = Recipe((1e-3,), steps=100, batch=256)
    published = Recipe((1e-3,), epochs=20, batch=256, weight_decay=0.01)

    def head(self, make: type[Head], knobs: TipKnobs, frozen: dict[str, torch.Tensor], episode: Episode) -> Head:
        trained = {"cached": frozen.pop("cached")}
        alpha, beta = knobs.alpha or 1.0, knobs.beta or 5.5
        return make(knobs, trained, frozen, clip=episode.clip, alpha=alpha, beta=beta).to(episode.clip.device)

    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(model.trained.parameters(), lr=lr, eps=1e-4, weight_decay=weight_decay)  # ty: ignore


register(TipAdapterF())
