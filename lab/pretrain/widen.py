"""More latent channels for models that are trained already: the first channels keep their meaning.

The VAE's new channels carry what the old ones lose; the UNet starts with its old channels as they were and learns the
new ones. New channels are half as wide as the old (`SPREAD`): at equal noise they are settled later, details after
shapes, as a picture's fine structure is in pixel-space diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

SPREAD = 0.5
State = dict[str, torch.Tensor]
# Which dimensions of a tensor are latent channels ("one each") or their moments (mean, then log-variance, of each).
VAE: dict[str, dict[int, str]] = {
    "encoder.conv_out.weight": {0: "moments"},
    "encoder.conv_out.bias": {0: "moments"},
    "quant_conv.weight": {0: "moments", 1: "moments"},
    "quant_conv.bias": {0: "moments"},
    "post_quant_conv.weight": {0: "one each", 1: "one each"},
    "post_quant_conv.bias": {0: "one each"},
    "decoder.conv_in.weight": {1: "one each"},
}
UNET: dict[str, dict[int, str]] = {
    "conv_in.weight": {1: "one each"},
    "conv_out.weight": {0: "one each"},
    "conv_out.bias": {0: "one each"},
}


def _placed(old: torch.Tensor, new: torch.Tensor, dimensions: dict[int, str]) -> torch.Tensor:
    """`new` with `old` where the old channels stand."""
    index = [torch.arange(n) for n in old.shape]
    for dim, kind in dimensions.items():
        if kind == "moments":
            mean = torch.arange(old.shape[dim] // 2)
            index[dim] = torch.cat([mean, mean + new.shape[dim] // 2])
    out = new.clone()
    out[torch.meshgrid(*index, indexing="ij")] = old
    return out


def vae(old: State, new: State) -> State:
    """An AutoencoderKL's weights with more latent channels than `old`; `new`: such a model's fresh weights.

    The new channels' mean and log-variance come from encoder.conv_out's fresh rows and pass the two 1×1 convolutions
    unmixed; the decoder reads them through its fresh columns.
    """
    new = dict(new)
    for name in ("quant_conv", "post_quant_conv"):
        new[f"{name}.weight"] = torch.eye(len(new[f"{name}.bias"]))[..., None, None]
        new[f"{name}.bias"] = torch.zeros_like(new[f"{name}.bias"])
    return {key: _placed(value, new[key], VAE.get(key, {})) for key, value in old.items()}


def unet(old: State, new: State) -> State:
    """A UNet2DConditionModel's weights with more latent channels: the new ones go in and come out as zero at first."""
    return {
        key: _placed(value, torch.zeros_like(new[key]), UNET[key]) if key in UNET else value
        for key, value in old.items()
    }


class Tie:
    """What holds a widened VAE's first channels to the old encoder's, and the new ones' spread to SPREAD of theirs."""

    def __init__(self, old: Any):
        self.old = old.eval().requires_grad_(False)

    def __call__(self, pixels: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """From pixels (n, 3, h, w) and the new latents' means (n, c, h', w'): 0 where both hold."""
        with torch.no_grad():
            wanted = self.old.encode(pixels).latent_dist.mean.float()
        kept, added = mean.float().split([wanted.shape[1], mean.shape[1] - wanted.shape[1]], 1)
        apart = F.mse_loss(kept, wanted) / wanted.var()
        spread = added.std((0, 2, 3)) / (SPREAD * wanted.std())
        return apart + 0.1 * spread.log().square().mean()
