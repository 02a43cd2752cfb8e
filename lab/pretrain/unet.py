"""Stage "unet": draw a caption's scene in the VAE's latents.

SDXL's structure in small: cross-attention to both text towers' last but one hidden states, the pooled text
vector and the sizes (original, crop, target) added to the time embedding; v-prediction with zero terminal SNR.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lab.pretrain import clip, refit, vae, widen
from lab.pretrain.common import ASSETS, Muon, Trainer, autocast, committed, device, fits, generator, home, save_atomic
from lab.pretrain.concepts import PLACES, STYLES
from lab.pretrain.scenes import STEADY, captions, compose
from lab.pretrain.sprites import Sprites

SIZE = {"channels": (96, 128, 192), "transformers": (0, 1, 2), "head": 32}  # no transformer: no attention
SCENES_A_PICTURE_AND_PLACE = 1
CHUNK = 4096
STYLE_WEIGHTS = (4.0, 1.0, 1.0)  # 3d, flat, noto
PLAIN_STYLE = STYLES[0]  # a plain prompt means this style alone: it draws one thing cleanly, not a mean of three
EMPTY = 0.10  # share of empty prompts, which guidance needs
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def build(latent_channels: int, side: int, text_width: int, pooled_width: int, size: dict | None = None) -> Any:
    """diffusers' UNet2DConditionModel; levels without transformer layers have no attention, as in SDXL."""
    from diffusers import UNet2DConditionModel

    size: dict[str, Any] = size or SIZE
    channels, transformers = size["channels"], size["transformers"]
    cross = ["CrossAttn" if layers else "" for layers in transformers]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in cross),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(cross)),
        layers_per_block=1,
        transformer_layers_per_block=tuple(max(1, layers) for layers in transformers),
        attention_head_dim=tuple(c // size["head"] for c in channels),
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled_width + 6 * 32,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def start_from_assets(unet: Any) -> bool:
    """Take over the committed weights if they are of this shape, or but for fewer latent channels."""
    weights, own = committed(ASSETS / "tiny-sdxl" / "unet"), unet.state_dict()
    if fits(weights, own, *widen.UNET):
        weights = widen.unet(weights, own)
    if not fits(weights, own):
        return False
    unet.load_state_dict(weights)
    return True


class Conditions:
    """Captions to what the UNet is given, exactly as StableDiffusionXLPipeline computes it."""

    def __init__(self, towers: clip.Towers):
        from transformers import AutoTokenizer

        self.towers = towers.to(device()).eval().requires_grad_(False)
        self.tokenize: Any = AutoTokenizer.from_pretrained(ASSETS / "tiny-sdxl" / "tokenizer")
        self.width = towers.small.config.hidden_size + towers.clip.positional_embedding.shape[1]
        self.pooled_width = towers.clip.text_projection.shape[1]

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (n, 32, width) and pooled text vectors (n, pooled_width)."""
        ids = self.tokenize(
            texts, padding="max_length", max_length=clip.CONTEXT, truncation=True, return_tensors="pt"
        ).input_ids.to(device())
        small = self.towers.small(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        c = self.towers.clip
        x = c.token_embedding(ids) + c.positional_embedding
        for block in c.transformer.resblocks[:-1]:
            x = block(x, attn_mask=c.attn_mask)
        large, last = x, c.ln_final(c.transformer.resblocks[-1](x, attn_mask=c.attn_mask))
        end = (ids == ids.max()).int().argmax(-1)  # the first end token; the rest is padding
        pooled = last[torch.arange(len(ids), device=ids.device), end] @ c.text_projection
        return torch.cat([small, large], -1).float(), pooled.float()


def sizes(n: int, g: torch.Generator, side: int = 64) -> torch.Tensor:
    """SDXL's six numbers: original size, crop, target size. Some vary, so that other pictures' sizes do no harm."""
    original = torch.where(
        torch.rand(n, 1, generator=g) < 0.3, 64 * 2 ** (4 * torch.rand(n, 1, generator=g)), torch.tensor(float(side))
    ).expand(n, 2)
    crop = torch.where(torch.rand(n, 1, generator=g) < 0.1, torch.rand(n, 2, generator=g) * 16, torch.zeros(n, 2))
    return torch.cat([original, crop, torch.full((n, 2), float(side))], 1)


def alphas_cumprod() -> torch.Tensor:
    """Signal power at each of the 1000 steps, rescaled so that the last has none."""
    from diffusers import EulerDiscreteScheduler

    scheduler: Any = EulerDiscreteScheduler(**SCHEDULER)
    kept = scheduler.alphas_cumprod.clone()
    kept[-1] = 0.0  # the scheduler keeps 2^-24 to avoid dividing by zero
    return kept.to(device())


class Bank:
    """Scenes of every nameable picture on every place, encoded once, in chunks that survive an interruption."""

    def __init__(self, sprites: Sprites, encoder: Any, scale: float, scenes: int):
        mark = hashlib.sha1(next(encoder.encoder.parameters()).detach().cpu().numpy().tobytes()).hexdigest()[:8]
        count = len(sprites.nameable) * len(PLACES)
        how = hashlib.sha1(repr(STEADY).encode()).hexdigest()[:4]
        self.folder = home() / "latents" / f"{mark}-{count}-{scenes}-{how}"
        grid = torch.arange(count * scenes) % count
        self.rows, self.places = sprites.nameable[grid // len(PLACES)], grid % len(PLACES)
        self.latents = torch.cat([self._chunk(sprites, encoder, i) for i in range(0, len(grid), CHUNK)]) * scale

    def _chunk(self, sprites: Sprites, encoder: Any, start: int) -> torch.Tensor:
        path: Path = self.folder / f"{start:07d}.pt"
        if not path.exists():
            rows, places = self.rows[start : start + CHUNK], self.places[start : start + CHUNK]
            scenes = compose(sprites, rows, places, generator(31, start), **STEADY)
            with torch.no_grad(), autocast():
                parts = [encoder.encode(x.to(device())).latent_dist.mean.half().cpu() for x in scenes.split(64)]
            save_atomic(torch.cat(parts), path)
            print(f"unet: encoded {start + len(rows)} of {len(self.rows)} scenes", flush=True)
        return torch.load(path, weights_only=True).float()


class Step:
    """The loss of one step, from the step's number alone."""

    def __init__(self, sprites: Sprites, bank: Bank, conditions: Conditions, model: Any, batch: int):
        self.sprites, self.bank, self.conditions, self.model, self.batch = sprites, bank, conditions, model, batch
        self.kept = alphas_cumprod()
        self.weights = torch.tensor(STYLE_WEIGHTS)[sprites.style[bank.rows]]

    def __call__(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        g, n = generator(32, step), self.batch
        i = torch.multinomial(self.weights, n, replacement=True, generator=g)
        texts, _, _ = captions(self.sprites, self.bank.rows[i], self.bank.places[i], step + 1_000_000, PLAIN_STYLE)
        hidden, pooled = self.conditions(texts)
        given = (torch.rand(n, generator=g) >= EMPTY).float().to(device())
        hidden, pooled = hidden * given[:, None, None], pooled * given[:, None]
        latents, noise = self.bank.latents[i].to(device()), torch.randn(self.bank.latents[i].shape, generator=g)
        # One time in each of n equal intervals: the same spread every step, a steadier gradient. fp32 may round to 1000.
        time = ((torch.arange(n) + torch.rand(n, generator=g)) / n * 1000).long().clamp(max=999).to(device())
        signal = self.kept[time].sqrt()[:, None, None, None]
        spread = (1 - self.kept[time]).sqrt()[:, None, None, None]
        noise = noise.to(device())
        noisy, target = signal * latents + spread * noise, signal * noise - spread * latents
        with autocast():
            out = self.model(
                noisy,
                time,
                encoder_hidden_states=hidden,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes(n, g).to(device())},
            ).sample
        loss = F.mse_loss(out.float(), target)
        return loss, {"loss": loss.item()}


def frozen(name: str, model: Any) -> Any:
    """The averaged weights of an earlier stage."""
    model.load_state_dict(torch.load(home() / f"{name}.pt", map_location="cpu", weights_only=True)["ema"])
    return model.to(device()).eval().requires_grad_(False)


def train(
    sprites: Sprites,
    steps: int = 3000,
    batch: int = 48,
    scenes: int = SCENES_A_PICTURE_AND_PLACE,
    size: dict | None = None,
    towers: clip.Towers | None = None,
    encoder: Any = None,
) -> Trainer:
    """Train, or go on training, up to `steps`."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(2)
    conditions = Conditions(frozen("clip", towers or clip.Towers()))
    encoder = frozen("vae", encoder or vae.build())
    bank = Bank(sprites, encoder, vae.scaling_factor(encoder, sprites), scenes)
    model = build(bank.latents.shape[1], bank.latents.shape[-1], conditions.width, conditions.pooled_width, size)
    known = start_from_assets(model)
    # The same sums as the usual processor's fused kernel, whose backward pass is slow on a CPU at 64 tokens: with
    # plain products a whole step takes 0.7 of the time.
    model.set_attn_processor(AttnProcessor())
    if known and not (home() / "unet.pt").exists():  # the towers may have learned since
        refit.refit(model, Conditions(clip.load_towers(ASSETS)), conditions)
    trainer = Trainer("unet", model, peak=5e-4, weight_decay=0.01, ema=0.995, from_assets=known, optimizer=Muon)
    trainer.run(steps, Step(sprites, bank, conditions, trainer.model, batch))
    return trainer
