"""Combinations Σᵢ cᵢ·vᵢ of pseudo-random basis vectors that are never kept: generated in chunks, or a fast transform.

`combine` is what NOLA and PRANC are made of. It is linear in the coefficients; its backward pass makes the basis
again, so that memory holds neither the basis nor anything of its size.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from lab import counter

CHUNK = 1 << 20  # basis entries generated at once: about 10 MB with the work space
_H = 128  # the transform is made of products with Hadamard matrices of at most this side


def combine(coefficients: torch.Tensor, basis: str, key: int, size: int, cache_bytes: int = 0) -> torch.Tensor:
    """Σᵢ cᵢ·vᵢ (size,) for coefficients (k,), with entries of every vᵢ of variance 1/(3k).

    `uniform`: independent U(-1, 1)/√k, the paper's. `hadamard`: random rows of a Walsh–Hadamard matrix with its
    columns' signs drawn at random, entries ±1/√(3k): orthogonal when `size` is a power of two, nearly so otherwise.
    `cache_bytes` bounds what all uniform bases together may keep between calls (one byte an entry).
    """
    return _Combine.apply(coefficients.float(), basis, key, size, cache_bytes)  # type: ignore[no-any-return]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, basis: str, key: int, size: int, cache_bytes: int) -> torch.Tensor:
        ctx.made_with = (basis, key, size, c.numel(), cache_bytes)
        return (_hadamard if basis == "hadamard" else _uniform)(c, key, size, cache_bytes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        basis, key, size, k, cache_bytes = ctx.made_with
        transposed = _hadamard_transposed if basis == "hadamard" else _uniform_transposed
        return transposed(grads[0].float(), key, size, k, cache_bytes), None, None, None, None


def vectors(basis: str, k: int, key: int, size: int) -> torch.Tensor:
    """The basis itself (k, size): for tests and small cases."""
    return torch.stack([combine(row, basis, key, size) for row in torch.eye(k)])


# -- uniform ----------------------------------------------------------------------------------------------------
# With b the signed bytes of the generator, vᵢ = (bᵢ + ½)/(128·√k): products are taken with b alone.


def _uniform(c: torch.Tensor, key: int, size: int, cache_bytes: int) -> torch.Tensor:
    total = c.new_zeros(size)
    for rows, columns, block in _chunks(key, c.numel(), size, c.device, cache_bytes):
        total[columns.start : columns.stop] += c[rows.start : rows.stop] @ block.float()
    return (total + 0.5 * c.sum()) / (128 * c.numel() ** 0.5)


def _uniform_transposed(g: torch.Tensor, key: int, size: int, k: int, cache_bytes: int) -> torch.Tensor:
    total = g.new_zeros(k)
    for rows, columns, block in _chunks(key, k, size, g.device, cache_bytes):
        total[rows.start : rows.stop] += block.float() @ g[columns.start : columns.stop]
    return (total + 0.5 * g.sum()) / (128 * k**0.5)


def _chunks(key: int, k: int, size: int, device: torch.device, cache_bytes: int) -> Any:
    """(rows, columns, signed bytes) over the whole basis, at most CHUNK entries at once."""
    kept = _cache.get(key, k, size, device, cache_bytes)
    wide = min(size, CHUNK // 4 * 4)
    for left in range(0, size, wide):
        columns = range(left, min(left + wide, size))
        high = max(1, CHUNK // len(columns))
        for top in range(0, k, high):
            rows = range(top, min(top + high, k))
            if kept is None:
                block = counter.uniform_bytes(key, rows, columns, device)
            else:
                block = kept[rows.start : rows.stop, columns.start : columns.stop]
            yield rows, columns, block


class _Cache:
    """Bases as bytes, up to a stated number of bytes over all of them.

    A full cache takes nothing more in: layers come round in the same order at every step, and a cache that threw out
    the oldest would never hit. What was not used for a minute gives way.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], tuple[torch.Tensor, float]] = {}

    def get(self, key: int, k: int, size: int, device: torch.device, limit: int) -> torch.Tensor | None:
        name, now = (key, k, size, device), time.monotonic()
        if name in self.kept:
            block = self.kept[name][0]
            self.kept[name] = (block, now)
            return block
        if k * size > limit:
            return None
        if self.bytes() + k * size > limit:
            self.kept = {n: (b, used) for n, (b, used) in self.kept.items() if now - used < 60}
        if self.bytes() + k * size > limit:
            return None
        block = torch.empty(k, size, dtype=torch.int8, device=device)
        high = max(1, CHUNK // size)
        for top in range(0, k, high):
            rows = range(top, min(top + high, k))
            block[rows.start : rows.stop] = counter.uniform_bytes(key, rows, range(size), device)
        self.kept[name] = (block, now)
        return block

    def bytes(self) -> int:
        return sum(block.numel() for block, _ in self.kept.values())


_cache = _Cache()


# -- Hadamard ---------------------------------------------------------------------------------------------------
# vᵢ[p] = σₚ·H[rowᵢ, p]/√(3k), H the ±1 Walsh–Hadamard matrix of side N = 2ᵃ ≥ size. Over the first `size` columns the
# product of rows i and j is at most 2ᵗ, t the lowest bit in which they differ: so rows differ in their lowest bits,
# which hold i, and are random in the others. That bounds every cosine by k/size, and makes it 0 where size = N.


def _hadamard(c: torch.Tensor, key: int, size: int, _: int) -> torch.Tensor:
    side = _side(size)
    spread = c.new_zeros(side).index_copy_(0, _rows(key, c.numel(), side, c.device), c)
    return transform(spread)[:size] * _signs(key, size, c.device).mul_((3 * c.numel()) ** -0.5)


def _hadamard_transposed(g: torch.Tensor, key: int, size: int, k: int, _: int) -> torch.Tensor:
    side = _side(size)
    spread = g.new_zeros(side)
    torch.mul(g, _signs(key, size, g.device), out=spread[:size])
    return transform(spread)[_rows(key, k, side, g.device)] * (3 * k) ** -0.5


def _side(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _rows(key: int, k: int, side: int, device: torch.device) -> torch.Tensor:
    """k different rows of the matrix: i in the low bits, random high bits."""
    low = _side(k)
    high = counter.words(key, range(1, 2), range(k), device)[0].bitwise_and_(side // low - 1)
    return torch.arange(k, device=device) + low * high.long()


def _signs(key: int, size: int, device: torch.device) -> torch.Tensor:
    """Random signs ±1 (size,) as float32: the sign bits of the generator's bytes."""
    bits = counter.uniform_bytes(key, range(1), range(size), device)[0].bitwise_right_shift_(7)  # -1 or 0
    return bits.mul_(2).add_(1).float()


def transform(x: torch.Tensor) -> torch.Tensor:
    """H·x for x (N,), N a power of two, H with entries ±1 in the natural (Sylvester) order.

    H is the Kronecker product of small Hadamard matrices, one for each axis of x reshaped; so a few matrix products
    of side 128 instead of log₂N passes over x.
    """
    size = x.numel()
    done = 1  # length of the axes already transformed, at the right
    while done < size:
        side = min(_H, size // done)
        h = _matrix(side, x.device, x.dtype)
        x = x.view(-1, side) @ h if done == 1 else h @ x.view(-1, side, done)  # (…, side[, done])
        done *= side
    return x.reshape(size)


@functools.lru_cache(maxsize=32)
def _matrix(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=dtype, device=device)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype, device=device)
    while h.shape[0] < side:
        h = torch.kron(two, h)
    return h


# -- quantised coefficients ---------------------------------------------------------------------------------------
def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes 0…2ᵇ−1 as uint8, smallest value, step): x ≈ smallest + step·code, over the vector's own range."""
    low, high = x.min(), x.max()
    step = (high - low) / (2**bits - 1)
    codes = torch.where(step > 0, (x - low) / step.clamp_min(1e-30), torch.zeros_like(x)).round().to(torch.uint8)
    return codes, low, step


def fake_quantise(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x rounded to 2ᵇ values over its range; the gradient goes through as if it had not been (straight-through)."""
    codes, low, step = quantise(x.detach(), bits)
    return x + (low + step * codes - x).detach()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (n,) of `bits` bits as ⌈n·bits/8⌉ bytes, lowest bits first."""
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = ((codes.cpu()[:, None] >> shifts) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The `count` codes that `pack` packed."""
    stream = ((packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)
    stream = stream[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(1).to(torch.uint8)
