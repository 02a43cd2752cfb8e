"""HashedNet's spread of K numbers over an update's entries, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lab import counter

CHUNK = 1 << 22  # entries hashed at a time: 100 MB of scratch at most


def places(key: int, count: int, k: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(entries, their buckets, their signs ±1) in chunks: the sign is a word's top bit, the bucket its rest modulo k."""
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        word = counter.words(key, range(1), range(first, last), device)[0]
        sign = (word.bitwise_right_shift(31) * 2 + 1).float()
        yield slice(first, last), word.bitwise_and(0x7FFFFFFF) % k, sign


class Spread(torch.autograd.Function):
    """w (k,) → entries (count,); the hash is made again on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, key: int, count: int) -> torch.Tensor:
        ctx.key, ctx.k = key, w.numel()
        out = w.new_empty(count)
        for part, bucket, sign in places(key, count, w.numel(), w.device):
            out[part] = w[bucket] * sign
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grads[0]
        total = grad.new_zeros(ctx.k)
        for part, bucket, sign in places(ctx.key, grad.numel(), ctx.k, grad.device):
            total.index_add_(0, bucket, grad[part] * sign)
        return total, None, None
