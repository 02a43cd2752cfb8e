"""EDM's formulation (Karras et al., arXiv 2206.00364), which Playground v2.5 was trained in.

The network is called on preconditioned latents and told ln(σ)/4; its preconditioned output is the clean latents, which
is what it is trained to be. As in the public DreamBooth-LoRA-SDXL recipe (`--do_edm_style_training`), noise levels are
drawn evenly over the 1000 of Karras' schedule, and losses are not weighted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_edm(scheduler: Any) -> bool:
    """Whether a sampler's, or a training schedule's, formulation is EDM's."""
    return type(scheduler).__name__.startswith("EDM")


def schedule(scheduler: Any) -> Any:
    """The noise levels and preconditioning that belong to a sampler: an EDMEulerScheduler of all its training steps."""
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler.from_config(scheduler.config)


def denoised(
    schedule: Any,
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    noise: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """The network's clean latents from `latents` with `noise` at levels `steps`, (b,) indices of the schedule.

    `network(inputs, told)` takes the preconditioned latents, and what it is told of the noise level, (b,).
    """
    sigma = _sigmas(schedule, steps, latents)
    noisy = latents + sigma * noise
    output = network(schedule.precondition_inputs(noisy, sigma), schedule.precondition_noise(sigma.flatten()))
    return schedule.precondition_outputs(noisy, output.float(), sigma)


def snr_weights(schedule: Any, steps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-γ weights of a loss on clean latents: min(SNR, γ) (Hang et al., arXiv 2303.09556, eq. 5), where SNR is the
    latents' variance, σ_data², over the noise's, σ²."""
    sigma = schedule.sigmas.to(steps.device)[steps].double()
    return (schedule.config.sigma_data / sigma).square().clamp(max=gamma).float()


def _sigmas(schedule: Any, steps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return schedule.sigmas.to(like)[steps].view(-1, *[1] * (like.dim() - 1))
