"""DreamBooth's objective over cached pictures, with optional prior preservation."""

from __future__ import annotations

from typing import Any

import torch

from lab.device import generator as seeded
from lab.diffusion import Pictures, denoising_loss


class DreamBooth:
    """Mean denoising loss of the subject's pictures, plus `prior_weight` times that of the class's.

    Pictures come in shuffled passes, the same for every method at the same seed: example number p of a run is picture
    p mod n of pass p div n, whose order is drawn from the seed and the pass. The subject's batch draws its random
    numbers before the class's.
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
    ) -> None:
        self.vae, self.schedule, self.pictures, self.prior = vae, schedule, pictures, prior
        self.batch, self.seed, self.snr_gamma, self.prior_weight = batch, seed, snr_gamma, prior_weight
        self.position = 0

    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        total = self._mean_loss(model, self.pictures, generator)
        if self.prior is not None:
            total = total + self.prior_weight * self._mean_loss(model, self.prior, generator)
        self.position += self.batch
        return total

    def _mean_loss(self, model: torch.nn.Module, pictures: Pictures, generator: torch.Generator) -> torch.Tensor:
        chosen = [self._example(len(pictures), self.position + i) for i in range(self.batch)]
        return denoising_loss(model, self.vae, self.schedule, pictures, chosen, generator, self.snr_gamma).mean()

    def _example(self, n: int, position: int) -> int:
        shuffled, at = divmod(position, n)
        return int(torch.randperm(n, generator=seeded(self.seed, 2, shuffled))[at])
