"""Drawing pictures with a latent diffusion pipeline: prompts × seeds in batches, from embeddings made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from lab import device as devices
from lab.diffusion import Pipeline, Prompt, safe_vae, unscaled
from lab.errors import LabError
from lab.networks import at_work, move

BATCH = 16  # pictures of at most 512 pixels a side drawn at once; of larger ones as many as have their pixels


class OutOfRangeError(LabError):
    """A picture whose numbers are not finite."""

    def __init__(self) -> None:
        super().__init__(
            "A picture came out as numbers out of range: the adapter's learning rate was probably too high, "
            "or the base needs its fp16-fixed VAE or weights in bf16."
        )


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
    batch: int | None = None,
    offload: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """One picture a prompt and seed (`prompts[i]` with `seeds[i]`).

    A picture depends on its own prompt and seed, not on its neighbours in the batch, but for rounding: its first noise
    is drawn on the CPU from its seed alone, the same for every method. `on_step(done, all)` counts sampling steps.
    With `offload`, the UNet leaves the accelerator while the VAE decodes, tile by tile. Where memory runs out, the
    batch is halved; raises LabError when one picture does not fit, or when numbers are not finite.
    """
    batch = batch or max(1, min(BATCH, BATCH * 512**2 // resolution**2))
    latents: list[torch.Tensor] = []
    while len(latents) < len(prompts):
        part = range(len(latents), min(len(latents) + batch, len(prompts)))
        count = -(-len(prompts) // batch)  # batches in all, this one's number: for the progress alone
        number = len(latents) // batch

        def told(done: int, number: int = number, count: int = count) -> None:
            if on_step:
                on_step(number * steps + done, count * steps)

        try:
            found = _denoise(pipe, [prompts[i] for i in part], [seeds[i] for i in part], negative,
                             steps=steps, guidance=guidance, resolution=resolution, told=told)  # fmt: skip
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise LabError(
                    f"Memory does not hold the drawing of one picture of {resolution} pixels: lower the resolution."
                ) from error
            batch = len(part) // 2
            torch.cuda.empty_cache()
            continue
        if not torch.isfinite(found).all():
            raise OutOfRangeError
        latents += list(found)
    return decode(pipe, torch.stack(latents), offload=offload)


def _denoise(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    negative: Prompt,
    *,
    steps: int,
    guidance: float,
    resolution: int,
    told: Callable[[int], None],
) -> torch.Tensor:
    """Latents of one batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = resolution // pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, side, side)
    first = torch.cat([torch.randn(shape, generator=g) for g in generators])

    def after(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told(step + 1)
        return tensors

    with devices.autocast_of(pipe.unet):
        return _bare(pipe)(
            prompt_embeds=torch.stack([p.states for p in prompts]),
            pooled_prompt_embeds=torch.stack([p.pooled for p in prompts]),
            negative_prompt_embeds=negative.states.expand(len(prompts), -1, -1),
            negative_pooled_prompt_embeds=negative.pooled.expand(len(prompts), -1),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=resolution,
            width=resolution,
            latents=first.to(pipe.unet.device),
            generator=generators,
            output_type="latent",
            callback_on_step_end=after,
        ).images


def _bare(pipe: Pipeline) -> Pipeline:
    """The pipeline without encoders and VAE, which may be off the device: it computes where its parts are."""
    from diffusers import StableDiffusionXLPipeline

    none: Any = None
    made: Pipeline = StableDiffusionXLPipeline(
        none, none, none, none, none, pipe.unet, pipe.scheduler, add_watermarker=False
    )
    made.vae_scale_factor = pipe.vae_scale_factor
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def decode(pipe: Pipeline, latents: torch.Tensor, *, offload: bool = False) -> list[Image.Image]:
    """Latents → pictures, large ones one at a time: the VAE's decoder is where memory peaks.

    Raises LabError when the numbers are not finite.
    """
    pictures, device = [], pipe.unet.device
    side = latents.shape[-1] * pipe.vae_scale_factor
    with at_work(pipe, "vae"), safe_vae(pipe) as vae:
        if offload:
            vae.enable_tiling()
            move(pipe.unet, torch.device("cpu"))
        try:
            for part in unscaled(vae, latents.float()).split(max(1, 2**17 // side**2)):
                pixels = vae.decode(part.to(vae.dtype), return_dict=False)[0].float()
                if not torch.isfinite(pixels).all():
                    raise OutOfRangeError
                pictures += pipe.image_processor.postprocess(pixels, output_type="pil")
        finally:
            if offload:
                vae.disable_tiling()
                move(pipe.unet, device)
    return pictures
