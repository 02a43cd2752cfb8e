"""Stages "vae" and "decoder": 64×64 pictures to 16×16 latents of 8 channels and back.

First encoder and decoder together, then the decoder alone, on latents with a little noise (the UNet's
are never exact) and with a perceptual term from the CLIP tower's first layers, if that is trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lab.pretrain import widen
from lab.pretrain.common import ASSETS, Trainer, autocast, committed, device, fits, generator, home
from lab.pretrain.concepts import PLACES
from lab.pretrain.scenes import compose
from lab.pretrain.sprites import Sprites

CHANNELS, LATENT_CHANNELS = (32, 64, 96), 8


def build(channels: tuple[int, ...] = CHANNELS, latent_channels: int = LATENT_CHANNELS) -> Any:
    """diffusers' AutoencoderKL; each further entry of `channels` halves the side once more."""
    from diffusers import AutoencoderKL

    blocks = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def start_from_assets(vae: Any) -> tuple[bool, widen.Tie | None]:
    """Take over the committed weights if they are of this shape; if they have fewer latent channels, widen them and
    give what ties the first channels to them."""
    folder = ASSETS / "tiny-sdxl" / "vae"
    weights = committed(folder)
    own = vae.state_dict()
    tie = None
    if fits(weights, own, *widen.VAE):
        tie = widen.Tie(type(vae).from_pretrained(folder, torch_dtype=torch.float32).to(device()))
        weights = widen.vae(weights, own)
    if not fits(weights, own):
        return False, None
    vae.load_state_dict(weights)
    return True, tie


def draw(sprites: Sprites, batch: int, seed: int, step: int) -> torch.Tensor:
    """Scenes for the VAE: three quarters nameable, every size, so that users' own pictures fare well too."""
    g = generator(21, seed, step)
    known = sprites.nameable[torch.randint(len(sprites.nameable), (batch * 3 // 4,), generator=g)]
    other = sprites.trainable[torch.randint(len(sprites.trainable), (batch - len(known),), generator=g)]
    places = torch.randint(len(PLACES), (batch,), generator=g)
    return compose(sprites, torch.cat([known, other]), places, g, (0.62, 1.0))


def _slopes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def pixel_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, and the error of the slopes, which keeps edges sharp."""
    slopes = sum((a - b).abs().mean() for a, b in zip(_slopes(out), _slopes(target), strict=True))
    return (out - target).abs().mean() + 2 * F.mse_loss(out, target) + 0.5 * slopes


def last_stage() -> str:
    """Whose checkpoint holds the VAE as it is used: "decoder" where that stage was run, else "vae"."""
    return "decoder" if (home() / "decoder.pt").exists() else "vae"


class Perception:
    """Distance in the first layers of the frozen CLIP image tower."""

    def __init__(self, visual: Any, layers: int = 2):
        self.visual, self.layers = visual.to(device()).eval().requires_grad_(False), layers

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Token features (n, tokens, width) after the first layers."""
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = v.ln_pre(x + v.positional_embedding[1:])
        for block in v.transformer.resblocks[: self.layers]:
            x = block(x)
        return F.layer_norm(x.float(), x.shape[-1:])

    def __call__(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        return F.mse_loss(self.features(out), wanted)


def perception() -> Perception | None:
    """From the CLIP stage's checkpoint, if there is one."""
    from lab.pretrain.clip import Towers

    path = home() / "clip.pt"
    if not path.exists():
        return None
    towers = Towers()
    towers.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["ema"])
    return Perception(towers.clip.visual)


@torch.no_grad()
def reconstructed(vae: Any, scenes: torch.Tensor) -> torch.Tensor:
    """Scenes encoded and decoded: what a UNet without a fault could show. Both (n, 3, side, side), on the processor."""
    parts = [vae.decode(vae.encode(x.to(device())).latent_dist.mean).sample.float().cpu() for x in scenes.split(64)]
    return torch.cat(parts)


@torch.no_grad()
def psnr(vae: Any, scenes: torch.Tensor) -> float:
    """Mean over scenes of the peak signal-to-noise ratio in dB."""
    with autocast():
        out = reconstructed(vae, scenes)
    error = ((out.clamp(-1, 1) - scenes) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def held_out_scenes(sprites: Sprites, rows: torch.Tensor | None = None, n: int = 256) -> torch.Tensor:
    """Scenes that no training step composes: of nameable pictures, or of the given rows."""
    g = generator(6, 7)
    pool = sprites.nameable if rows is None else rows
    rows = pool[torch.randint(len(pool), (n,), generator=g)]
    return compose(sprites, rows, torch.randint(len(PLACES), (n,), generator=g), g)


def _evaluate(vae: Any, sprites: Sprites) -> str:
    return (
        f"PSNR {psnr(vae, held_out_scenes(sprites)):.2f} dB, of subjects never seen "
        f"{psnr(vae, held_out_scenes(sprites, sprites.held_out, 60)):.2f} dB"
    )


def train(
    sprites: Sprites,
    steps: int = 600,
    batch: int = 32,
    channels: tuple[int, ...] = CHANNELS,
    latent_channels: int = LATENT_CHANNELS,
) -> Trainer:
    """Encoder and decoder together."""
    torch.manual_seed(1)
    vae = build(channels, latent_channels)
    known, tie = start_from_assets(vae)
    trainer = Trainer("vae", vae, peak=8e-4, weight_decay=1e-4, ema=0.995, from_assets=known)

    model: Any = trainer.model

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        pixels = draw(sprites, batch, 0, step).to(device())
        g = generator(22, step)
        with autocast():
            posterior = model.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g).to(device())
            out = model.decode(posterior.mean + posterior.std * noise).sample
            tied = tie(pixels, posterior.mean) if tie else out.new_zeros(())
        pixel, kl = pixel_loss(out.float(), pixels), posterior.kl().float().mean() / noise[0].numel()
        return pixel + 1e-4 * kl + tied, {"pixel": pixel.item(), "kl": kl.item(), "tied": tied.item()}

    trainer.run(steps, loss, lambda: _evaluate(trainer.ema.model, sprites))
    return trainer


def scaling_factor(vae: Any, sprites: Sprites) -> float:
    """What brings the latents to unit spread."""
    with torch.no_grad(), autocast():
        latents = [vae.encode(draw(sprites, 64, 1, i).to(device())).latent_dist.mean for i in range(4)]
    return float(1 / torch.cat(latents).float().std())


def train_decoder(
    sprites: Sprites,
    steps: int = 1000,
    batch: int = 32,
    channels: tuple[int, ...] = CHANNELS,
    latent_channels: int = LATENT_CHANNELS,
    perceive: Perception | None = None,
) -> Trainer:
    """The decoder alone: latents, and with them the UNet, stay valid."""
    vae = build(channels, latent_channels)
    vae.load_state_dict(torch.load(home() / "vae.pt", map_location="cpu", weights_only=True)["ema"])
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    trainer = Trainer("decoder", vae, peak=8e-4, weight_decay=1e-4, ema=0.995)
    spread = 1 / scaling_factor(trainer.model, sprites)

    model: Any = trainer.model

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        pixels = draw(sprites, batch, 2, step).to(device())
        with autocast():
            with torch.no_grad():
                latents = model.encode(pixels).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator(23, step)).to(device())
            out = model.decode(latents + 0.04 * spread * noise).sample
            seen = perceive(out, pixels) if perceive else out.new_zeros(())
        pixel = pixel_loss(out.float(), pixels)
        return pixel + 0.05 * seen, {"pixel": pixel.item(), "perception": seen.item()}

    trainer.run(steps, loss, lambda: _evaluate(trainer.ema.model, sprites))
    return trainer
