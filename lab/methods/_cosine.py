"""The cosine transform of LoCA, and coefficients at places that can be learned."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch


@functools.lru_cache(maxsize=16)
def cosine(size: int, device: torch.device) -> torch.Tensor:
    """Orthonormal DCT-II matrix C (size, size): C[k, i] = √(2/size)·cos(π(2i+1)k / 2size), first row 1/√size."""
    i = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi * (2 * i[None, :] + 1) * i[:, None] / (2 * size)) * math.sqrt(2 / size)
    table[0] = 1 / math.sqrt(size)
    return table.float().to(device)


class Place(torch.autograd.Function):
    """c (k,), places (k, 2) → S (m, n), zero but for c at the rounded places; coefficients in one place add.

    Back come c's gradient, Z at its place, and the places' by central differences of Z (one-sided at the border), held
    within ±1 as in the released code.
    """

    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, places: torch.Tensor, m: int, n: int) -> torch.Tensor:
        i = places[:, 0].round().clamp(0, m - 1).long()
        j = places[:, 1].round().clamp(0, n - 1).long()
        ctx.save_for_backward(c, i, j)
        return c.new_zeros(m, n).index_put_((i, j), c, accumulate=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        Z, (c, i, j) = grads[0], ctx.saved_tensors
        m, n = Z.shape
        g_c = Z[i, j] if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return g_c, None, None, None
        down = Z[(i + 1).clamp_max(m - 1), j] - Z[(i - 1).clamp_min(0), j]
        across = Z[i, (j + 1).clamp_max(n - 1)] - Z[i, (j - 1).clamp_min(0)]
        return g_c, (torch.stack((c * down, c * across), dim=1) / 2).clamp(-1, 1), None, None
