"""Latent diffusion as SDXL does it: what is computed once, and the training loss. `lab/sampling.py` draws.

Nothing here knows of adapters: whatever is injected in the pipeline's networks takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lab import edm, images
from lab.errors import LabError
from lab.networks import ENCODERS, at_work

# diffusers' own annotations leave out what its classes do (config attributes, module calls): they cannot be checked.
Pipeline = Any  # StableDiffusionXLPipeline
Schedule = Any  # DDPMScheduler, or EDMEulerScheduler for bases of EDM's formulation


@dataclass
class Pictures:
    """Training pictures of one concept, encoded once. n pictures, prompts of L tokens.

    mean, std: of the VAE's posterior, unscaled, (c, h, w) for each picture; time_ids (n, 6): height, width, top, left,
    target height and width (SDXL, section 2.2); texts: the prompts; states (n, L, d) and pooled (n, p): their
    embeddings.
    """

    mean: list[torch.Tensor]
    std: list[torch.Tensor]
    time_ids: torch.Tensor
    texts: list[str]
    states: torch.Tensor
    pooled: torch.Tensor

    def __len__(self) -> int:
        return len(self.mean)


@dataclass
class Prompt:
    """One prompt's embeddings: states (L, d), pooled (p,)."""

    states: torch.Tensor
    pooled: torch.Tensor


def embed(pipe: Pipeline, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of each text, states (n, L, d) and pooled (n, p), by the encoders as they are, with gradients."""
    distinct = list(dict.fromkeys(texts))
    states, _, pooled, _ = pipe.encode_prompt(
        prompt=distinct, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    index = torch.tensor([distinct.index(text) for text in texts], device=states.device)
    return states[index], pooled[index]


@torch.no_grad()
def encode_prompts(pipe: Pipeline, texts: Sequence[str]) -> dict[str, Prompt]:
    """Embeddings of each distinct text, and under "" those of the empty (negative) prompt.

    The encoders leave the accelerator afterwards. Raises LabError when their numbers overflow.
    """
    distinct = [text for text in dict.fromkeys(texts) if text]
    found: dict[str, Prompt] = {}
    with at_work(pipe, *ENCODERS):
        for text in distinct or ["a"]:
            states, none, pooled, none_pooled = pipe.encode_prompt(
                prompt=text,
                device=pipe.unet.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance="" not in found,  # the empty prompt is the same for all
            )
            if not (torch.isfinite(states).all() and torch.isfinite(pooled).all()):
                raise LabError(
                    f"The text encoders give numbers out of range for '{text[:60]}': hold the base's weights in bf16 "
                    "or fp32, or lower the learning rate if the encoders are trained."
                )
            found[text] = Prompt(states[0].float(), pooled[0].float())
            if none is not None:
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
    buckets: bool = False,
) -> Pictures:
    """Encode pictures and prompts. With `flip`, every mirrored picture follows as one more.

    Crops are told in pixels of the picture as resized for training, as SDXL was trained. With `buckets`, a picture
    without a crop is trained in the bucket nearest to its own aspect ratio, whose height and width are then the target
    size. The VAE and the encoders leave the accelerator afterwards. Raises LabError, naming the picture, when the
    VAE's numbers overflow.
    """
    views, time_ids, texts = [], [], []
    step = images.bucket_step(resolution, pipe.vae_scale_factor)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        crop = crops[number] if crops else None
        view = images.framed(picture, crop, resolution, number, bucket_step=step if buckets else 0)
        width, height = view.picture.size
        for mirrored in (False, True) if flip else (False,):
            flipped = view.picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else view.picture
            views.append(flipped)
            x = view.right if mirrored else view.left
            told = (picture.height, picture.width, view.top, x, height, width)
            time_ids.append(told if size_conditioning else (height, width, 0, 0, height, width))
            texts.append(prompt)
    with at_work(pipe, "vae"):
        mean, std = zip(*(_posterior(pipe, view, number) for number, view in enumerate(views)), strict=True)
    embedded = encode_prompts(pipe, texts)
    return Pictures(
        list(mean),
        list(std),
        torch.tensor(time_ids, dtype=torch.float32, device=pipe.unet.device),
        texts,
        torch.stack([embedded[text].states for text in texts]),
        torch.stack([embedded[text].pooled for text in texts]),
    )


def _posterior(pipe: Pipeline, view: Image.Image, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = pipe.image_processor.preprocess(view)  # (1, 3, height, width) in -1..1
    with safe_vae(pipe) as vae:
        posterior = vae.encode(pixels.to(pipe.unet.device, vae.dtype)).latent_dist
    if not torch.isfinite(posterior.mean).all():
        raise LabError(
            f"The VAE gives numbers out of range for picture {number + 1}: "
            "take the base's fp16-fixed VAE, or set LAB_DEVICE=cpu."
        )
    return posterior.mean[0].float(), posterior.std[0].float()


class safe_vae:  # noqa: N801 - used as a context manager
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

    if edm.is_edm(pipe.scheduler):
        return edm.schedule(pipe.scheduler)
    schedule: Schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise LabError(
            f"This base predicts '{schedule.config.prediction_type}': the lab trains bases that predict epsilon or v."
        )
    return schedule


def snr_weights(schedule: Schedule, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-γ weights (Hang et al., arXiv 2303.09556, eq. 6 and its v form): min(SNR, γ)/SNR, or /(SNR + 1).

    At zero terminal SNR the ε weight is its limit, 1. (diffusers' DreamBooth script takes min(SNR, γ)/SNR + 1 for v;
    the paper's form is that of diffusers' text-to-image scripts and of kohya's.)
    """
    if edm.is_edm(schedule):
        return edm.snr_weights(schedule, timesteps, gamma)
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
    embedded: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Loss of each chosen picture, (batch,): mean squared error over its latent, weighted by min-SNR where asked.

    `embedded`: states and pooled embeddings of the chosen pictures' texts, where they are not the cached ones.
    Drawn from the generator, on the CPU so that every device sees the same, in this order: the latents from the VAE's
    posterior, the noise, the timesteps. Pictures of one size go through the UNet together.
    """
    device, count = pictures.time_ids.device, len(chosen)
    mean, std = [pictures.mean[i] for i in chosen], [pictures.std[i] for i in chosen]
    draw, noise = ([torch.randn(m.shape, generator=generator).to(device) for m in mean] for _ in range(2))
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (count,), generator=generator).to(device)
    index = torch.as_tensor(chosen, device=device)
    states, pooled = embedded or (pictures.states[index], pictures.pooled[index])
    losses: list[Any] = [None] * count
    for shape in dict.fromkeys(m.shape for m in mean):
        part = [i for i in range(count) if mean[i].shape == shape]
        latents = scaled(vae, torch.stack([mean[i] + std[i] * draw[i] for i in part]))
        known = {"text_embeds": pooled[part], "time_ids": pictures.time_ids[index[part]]}
        noises, t = torch.stack([noise[i] for i in part]), timesteps[part]
        words = states[part]

        def called(noisy: Any, time: Any, words: Any = words, known: Any = known) -> Any:
            return unet(noisy, time, encoder_hidden_states=words, added_cond_kwargs=known).sample

        wanted = noises
        if edm.is_edm(schedule):
            predicted, wanted = edm.denoised(schedule, called, latents, noises, t), latents
        else:
            predicted = called(schedule.add_noise(latents, noises, t), t)
            if schedule.config.prediction_type == "v_prediction":
                wanted = schedule.get_velocity(latents, noises, t)
        for i, loss in zip(part, (predicted.float() - wanted).square().mean(dim=(1, 2, 3)), strict=True):
            losses[i] = loss
    found = torch.stack(losses)
    return found if snr_gamma is None else found * snr_weights(schedule, timesteps, snr_gamma)
