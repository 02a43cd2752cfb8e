"""Quantised coefficients: NOLA's vectors as codes of a few bits, and codes as bytes of a file."""

from __future__ import annotations

import torch


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
