"""Latent diffusion as SDXL does it: what is computed once, the training loss, sampling.

Nothing here knows of adapters: whatever is injected in `pipe.unet` takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lab import device as devices
from lab.errors import LabError
from lab.images import crop_box, cropped

# diffusers' own annotations leave out what its classes do (config attributes, module calls): they cannot be checked.
Pipeline = Any  # StableDiffusionXLPipeline
Schedule = Any  # DDPMScheduler


@dataclass
class Pictures:
    """Training pictures of one concept, encoded once. n pictures, latents of c×h×w, prompts of L tokens.

    mean, std (n, c, h, w): the VAE's posterior, unscaled; time_ids (n, 6): height, width, top, left, target height and
    width (SDXL, section 2.2); states (n, L, d) and pooled (n, p): the prompts' embeddings.
    """

    mean: torch.Tensor
    std: torch.Tensor
    time_ids: torch.Tensor
    states: torch.Tensor
    pooled: torch.Tensor

    def __len__(self) -> int:
        return len(self.mean)


@dataclass
class Prompt:
    """One prompt's embeddings: states (L, d), pooled (p,)."""

    states: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def encode_prompts(pipe: Pipeline, texts: Sequence[str]) -> dict[str, Prompt]:
    """Embeddings of each distinct text, and under "" those of the empty (negative) prompt."""
    distinct = [text for text in dict.fromkeys(texts) if text]
    found: dict[str, Prompt] = {}
    for text in distinct or ["a"]:
        states, none, pooled, none_pooled = pipe.encode_prompt(
            prompt=text, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        found[text] = Prompt(states[0].float(), pooled[0].float())
        found[""] = Prompt(none[0].float(), none_pooled[0].float())
    return found


@torch.no_grad()
def encode_pictures(
    pipe: Pipeline,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    resolution: int,
    crops: Sequence[Sequence[int] | None] | None = None,
    *,
    flip: bool = False,
    size_conditioning: bool = True,
) -> Pictures:
    """Encode pictures and prompts. With `flip`, every mirrored picture follows as one more.

    Crops are told in pixels of the picture as resized for training, as SDXL was trained. Raises LabError, naming the
    picture, when the VAE's numbers overflow.
    """
    squares, time_ids, texts = [], [], []
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        crop = crops[number] if crops else None
        left, top, size = crop_box(picture, crop, number)
        square = cropped(picture, crop, resolution, number)
        scale = resolution / size
        right = picture.width - left - size
        for mirrored in (False, True) if flip else (False,):
            squares.append(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square)
            x = right if mirrored else left
            told = (picture.height, picture.width, round(top * scale), round(x * scale), resolution, resolution)
            time_ids.append(told if size_conditioning else (resolution, resolution, 0, 0, resolution, resolution))
            texts.append(prompt)
    mean, std = zip(*(_posterior(pipe, square, number) for number, square in enumerate(squares)), strict=True)
    embedded = encode_prompts(pipe, texts)
    return Pictures(
        torch.cat(mean),
        torch.cat(std),
        torch.tensor(time_ids, dtype=torch.float32, device=pipe.device),
        torch.stack([embedded[text].states for text in texts]),
        torch.stack([embedded[text].pooled for text in texts]),
    )


def _posterior(pipe: Pipeline, square: Image.Image, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = pipe.image_processor.preprocess(square)  # (1, 3, resolution, resolution) in -1..1
    with _safe_vae(pipe) as vae:
        posterior = vae.encode(pixels.to(pipe.device, vae.dtype)).latent_dist
    if not torch.isfinite(posterior.mean).all():
        raise LabError(
            f"The VAE gives numbers out of range for picture {number + 1}: "
            "take the base's fp16-fixed VAE, or set LAB_DEVICE=cpu."
        )
    return posterior.mean.float(), posterior.std.float()


class _safe_vae:  # noqa: N801 - used as a context manager
    """The VAE, in fp32 while it is used where its own numbers overflow in fp16 (`force_upcast`)."""

    def __init__(self, pipe: Pipeline) -> None:
        self.vae, self.dtype = pipe.vae, pipe.vae.dtype
        self.upcast = self.dtype == torch.float16 and self.vae.config.force_upcast

    def __enter__(self) -> Any:
        return self.vae.float() if self.upcast else self.vae

    def __exit__(self, *_: object) -> None:
        if self.upcast:
            self.vae.to(self.dtype)


# -- the latents' scale --------------------------------------------------------------------------------
def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation by which a VAE's latents are normalised before its scaling factor."""
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return 0.0, 1.0
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


def scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the UNet sees, from what the VAE gives."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std * vae.config.scaling_factor


def unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    mean, std = _statistics(vae, latents)
    return latents / vae.config.scaling_factor * std + mean


# -- training ------------------------------------------------------------------------------------------
def training_schedule(pipe: Pipeline) -> Schedule:
    """The noise schedule the base was trained with, read from its sampler's configuration (betas, prediction type,
    zero terminal SNR). Raises LabError when the base predicts neither noise nor velocity."""
    from diffusers import DDPMScheduler

    schedule: Schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise LabError(
            f"This base predicts '{schedule.config.prediction_type}': the lab trains bases that predict epsilon or v."
        )
    return schedule


def snr_weights(schedule: Schedule, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-γ weights (Hang et al., arXiv 2303.09556, eq. 6 and its v form): min(SNR, γ)/SNR, or /(SNR + 1).

    At zero terminal SNR the ε weight is its limit, 1.
    """
    alphas = schedule.alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = alphas / (1 - alphas)
    if schedule.config.prediction_type == "v_prediction":
        return (snr.clamp(max=gamma) / (snr + 1)).float()
    return (gamma / snr).clamp(max=1).float()


def denoising_loss(
    unet: Any,
    vae: Any,
    schedule: Schedule,
    pictures: Pictures,
    chosen: Sequence[int],
    generator: torch.Generator,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Loss of each chosen picture, (batch,): mean squared error over its latent, weighted by min-SNR where asked.

    Drawn from the generator, on the CPU so that every device sees the same, in this order: the latents from the VAE's
    posterior, the noise, the timesteps.
    """
    index = torch.as_tensor(chosen, device=pictures.mean.device)
    mean = pictures.mean[index]
    draw = torch.randn(mean.shape, generator=generator).to(mean.device)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    steps = schedule.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(index),), generator=generator).to(mean.device)
    latents = scaled(vae, mean + pictures.std[index] * draw)
    noisy = schedule.add_noise(latents, noise, timesteps)
    known = {"text_embeds": pictures.pooled[index], "time_ids": pictures.time_ids[index]}
    predicted = unet(noisy, timesteps, encoder_hidden_states=pictures.states[index], added_cond_kwargs=known).sample
    wanted = noise
    if schedule.config.prediction_type == "v_prediction":
        wanted = schedule.get_velocity(latents, noise, timesteps)
    losses = (predicted.float() - wanted).square().mean(dim=(1, 2, 3))
    return losses if snr_gamma is None else losses * snr_weights(schedule, timesteps, snr_gamma)


# -- sampling ------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    negative: Prompt,
    *,
    steps: int,
    guidance: float,
    resolution: int,
    batch: int = 16,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """One picture a prompt and seed (`prompts[i]` with `seeds[i]`).

    A picture depends on its own prompt and seed, not on its neighbours in the batch, but for rounding: its first noise
    is drawn on the CPU from its seed alone, the same for every method. `on_step(done, all)` counts sampling steps.
    """
    pictures: list[Image.Image] = []
    parts = [range(i, min(i + batch, len(prompts))) for i in range(0, len(prompts), batch)]
    for number, part in enumerate(parts):
        generators = [torch.Generator().manual_seed(seeds[i]) for i in part]
        side = resolution // pipe.vae_scale_factor
        shape = (1, pipe.unet.config.in_channels, side, side)
        first = torch.cat([torch.randn(shape, generator=g) for g in generators])

        def told(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any], number: int = number) -> dict[str, Any]:
            if on_step:
                on_step(number * steps + step + 1, len(parts) * steps)
            return tensors

        with devices.autocast(pipe.device):
            latents = pipe(
                prompt_embeds=torch.stack([prompts[i].states for i in part]),
                pooled_prompt_embeds=torch.stack([prompts[i].pooled for i in part]),
                negative_prompt_embeds=negative.states.expand(len(part), -1, -1),
                negative_pooled_prompt_embeds=negative.pooled.expand(len(part), -1),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=resolution,
                width=resolution,
                latents=first.to(pipe.device),
                generator=generators,
                output_type="latent",
                callback_on_step_end=told,
            ).images
        pictures += decode(pipe, latents)
    return pictures


@torch.no_grad()
def decode(pipe: Pipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Latents → pictures, large ones one at a time: the VAE's decoder is where memory peaks.

    Raises LabError when the numbers are not finite.
    """
    pictures = []
    side = latents.shape[-1] * pipe.vae_scale_factor
    with _safe_vae(pipe) as vae:
        for part in unscaled(vae, latents.float()).split(max(1, 2**17 // side**2)):
            pixels = vae.decode(part.to(vae.dtype), return_dict=False)[0].float()
            if not torch.isfinite(pixels).all():
                raise LabError(
                    "A picture came out as numbers out of range: the adapter's learning rate was probably too high, "
                    "or the base needs its fp16-fixed VAE."
                )
            pictures += pipe.image_processor.postprocess(pixels, output_type="pil")
    return pictures
