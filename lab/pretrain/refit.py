"""Text towers that went on training speak a slightly different language: teach a UNet that one, in one go.

The linear map from the new towers' hidden states to the old ones' (least squares over captions) is folded
into the UNet's keys and values, and that of the pooled vectors into its time embedding. The UNet then starts
where it stood, instead of unlearning and learning anew.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from lab.pretrain.concepts import CONCEPTS, PLACES, STYLES, caption


def _map(new: torch.Tensor, old: torch.Tensor, ridge: float = 1e-4) -> tuple[torch.Tensor, float]:
    """The matrix M with new @ M ≈ old, and the share of old's variance that it explains."""
    new, old = new.double(), old.double()
    gram = new.T @ new
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    matrix = torch.linalg.solve(gram, new.T @ old)
    left = (new @ matrix - old).square().sum() / (old - old.mean(0)).square().sum()
    return matrix.float(), 1 - left.item()


@torch.no_grad()
def refit(unet: Any, old, new, captions: int = 900) -> tuple[float, float]:
    """Fold the maps from conditions `new` to conditions `old` into the UNet; how well each fits (1: exactly)."""
    r = random.Random(0)
    texts = [caption(r, CONCEPTS[i % len(CONCEPTS)], r.choice(PLACES), r.choice(STYLES))[0] for i in range(captions)]
    old_hidden, old_pooled = old(texts)
    new_hidden, new_pooled = new(texts)
    hidden, hidden_fit = _map(new_hidden.flatten(0, 1).cpu(), old_hidden.flatten(0, 1).cpu())
    pooled, pooled_fit = _map(new_pooled.cpu(), old_pooled.cpu())
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.copy_(module.weight @ hidden.T.to(module.weight))
    first = unet.add_embedding.linear_1.weight  # (width, pooled + six sizes)
    width = pooled.shape[0]
    first[:, :width] = first[:, :width] @ pooled.T.to(first)
    return hidden_fit, pooled_fit
