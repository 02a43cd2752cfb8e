"""Stage "image": the CLIP image tower alone learns to read pictures that went through the VAE.

Text towers, and with them the UNet's conditioning, stay as they are. The tower as the stage "clip" left it is the
teacher: a scene's embedding stays where it was, and the same scene once through the VAE, its latents a little noisy as
a UNet's are, is brought there (distillation); both must still be named right among all concepts. The UNet's own pictures
are never shown: the tower judges them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from lab.pretrain import clip, unet, vae
from lab.pretrain.common import Trainer, autocast, device, generator
from lab.pretrain.concepts import CONCEPTS, prompt
from lab.pretrain.sprites import Sprites

SHARE_OF_NAMING = 0.05  # beside cosine distances of about 0.1


class Step:
    """The loss of one step, from the step's number alone."""

    def __init__(self, sprites: Sprites, towers: clip.Towers, auto: Any, batch: int):
        self.draw = clip.Step(sprites, towers, batch).draw
        self.sprites, self.auto, self.towers = sprites, auto, towers
        self.teacher = copy.deepcopy(towers.clip.visual).eval().requires_grad_(False)
        self.spread = 1 / vae.scaling_factor(auto, sprites)
        with torch.no_grad(), autocast():
            ids = clip.tokenizer()([prompt(name) for name in CONCEPTS])
            self.names = [encode(ids) for encode in (towers.text, towers.text_small)]

    @torch.no_grad()
    def through_vae(self, pixels: torch.Tensor, step: int) -> torch.Tensor:
        """Scenes (n, 3, 64, 64) decoded from their latents with noise of up to 8 % of the latents' spread."""
        g = generator(41, step)
        latents = self.auto.encode(pixels).latent_dist.mean
        noise = torch.randn(latents.shape, generator=g) * torch.rand(len(latents), 1, 1, 1, generator=g)
        return self.auto.decode(latents + 0.08 * self.spread * noise.to(latents)).sample.clamp(-1, 1)

    def __call__(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rows, _, pixels = self.draw(step)
        pixels, concept = pixels.to(device()), self.sprites.concept[rows].to(device())
        known = concept < len(CONCEPTS)
        with autocast():
            with torch.no_grad():
                wanted = F.normalize(self.teacher(pixels).float(), dim=-1)
            seen = self.towers.image(torch.cat([pixels, self.through_vae(pixels, step)]))
            apart = [1 - (part * wanted).sum(-1).mean() for part in seen.chunk(2)]
            scale = self.towers.clip.logit_scale.exp().detach()
            logits = [scale * seen[known.repeat(2)] @ names.T for names in self.names]
        naming = sum(F.cross_entropy(x, concept[known].repeat(2)) for x in logits)
        through = (logits[0].argmax(1) == concept[known].repeat(2)).float().chunk(2)[1].mean()
        report = {"crisp": apart[0].item(), "through vae": apart[1].item(), "named": through.item()}
        return apart[0] + apart[1] + SHARE_OF_NAMING * naming, report


def train(
    sprites: Sprites, steps: int = 200, batch: int = 96, towers: clip.Towers | None = None, auto: Any = None
) -> Trainer:
    """Train, or go on training, up to `steps`; needs the stages "clip" and "vae"."""
    towers = unet.frozen("clip", towers or clip.Towers())
    step = Step(sprites, towers, unet.frozen(vae.last_stage(), auto or vae.build()), batch)
    trainer = Trainer("image", towers.clip.visual.requires_grad_(True), peak=4e-4, weight_decay=0.01, ema=0.98)
    trainer.decay = 0.95  # the weights are far along: only the fall
    trainer.run(steps, step)
    return trainer
