"""DreamBooth's objective over cached pictures, with optional prior preservation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lab.device import generator as seeded
from lab.diffusion import Pictures, denoising_loss


class DreamBooth:
    """Mean denoising loss of the subject's pictures, plus `prior_weight` times that of the class's.

    Pictures come in shuffled passes, the same for every method at the same seed: example number p of a run is picture
    p mod n of pass p div n, whose order is drawn from the seed and the pass. The subject's batch draws its random
    numbers before the class's. `embed` gives the embeddings of texts where the text encoders are trained: with both
    batches' texts in one call, as in the public recipe.
    """

    def __init__(
        self,
        vae: Any,
        schedule: Any,
        pictures: Pictures,
        prior: Pictures | None = None,
        *,
        batch: int,
        seed: int,
        snr_gamma: float | None = None,
        prior_weight: float = 0.0,
        embed: Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.vae, self.schedule, self.pictures, self.prior = vae, schedule, pictures, prior
        self.batch, self.seed, self.snr_gamma, self.prior_weight = batch, seed, snr_gamma, prior_weight
        self.embed = embed
        self.position = 0

    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        sets = [self.pictures] if self.prior is None else [self.pictures, self.prior]
        chosen = [[self._example(len(some), self.position + i) for i in range(self.batch)] for some in sets]
        embedded: list[Any] = [None] * len(sets)
        if self.embed is not None:
            texts = [some.texts[i] for some, indices in zip(sets, chosen, strict=True) for i in indices]
            embedded = list(zip(*(part.split(self.batch) for part in self.embed(texts)), strict=True))
        total: Any = 0.0
        for some, indices, words, weight in zip(sets, chosen, embedded, (1.0, self.prior_weight), strict=False):
            losses = denoising_loss(
                model, self.vae, self.schedule, some, indices, generator, self.snr_gamma, embedded=words
            )
            total = total + weight * losses.mean()
        self.position += self.batch
        return total

    def _example(self, n: int, position: int) -> int:
        shuffled, at = divmod(position, n)
        return int(torch.randperm(n, generator=seeded(self.seed, 2, shuffled))[at])
