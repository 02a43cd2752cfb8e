"""NoRA's fold of the inner factors into the outer ones, with a backward pass written out: two products, nothing kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        b: torch.Tensor,
        a: torch.Tensor,
        B: torch.Tensor,
        A: torch.Tensor,
        b0: torch.Tensor,
        a0: torch.Tensor,
        q0: torch.Tensor,
        p0: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(B, A)
        d_b, d_a = (b - b0).T @ B.T, (a - a0) @ A  # (i, m), (i, n): thin products are fastest with the thin side first
        return torch.cat((d_b, q0.T)).T, torch.cat((p0 + d_a, d_a))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        B, A = ctx.saved_tensors
        left, right = grads
        i = right.shape[0] // 2
        return (left.T[:i] @ B).T, (right[:i] + right[i:]) @ A.T, None, None, None, None, None, None


def fold(t: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """([D_B, Q0] (m, 2i), [P0 + D_A; D_A] (2i, n)) with D_B = B(B' - B'0), D_A = (A' - A'0)A."""
    names = ("inner_b", "inner_a", "outer_b", "outer_a", "start_b", "start_a", "start_q", "start_p")
    return _Fold.apply(*(t[name] for name in names))  # type: ignore[no-any-return]
