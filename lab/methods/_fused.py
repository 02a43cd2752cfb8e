"""A plain linear layer and a low-rank update in one autograd function: fewer and larger operations than layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, B: torch.Tensor, A: torch.Tensor
) -> torch.Tensor:
    """x·(W + B·A)ᵀ + bias for x (..., n), frozen W (m, n) and bias (m,), B (m, r), A (r, n): (..., m)."""
    return _Linear.apply(x, weight, bias, A, B.T)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        rows: torch.Tensor,  # Bᵀ (r, m): its gradient is then a thin product with the thin side first, which is fast
    ) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        inner = tokens @ A.T
        rows = rows.contiguous()
        ctx.save_for_backward(tokens, weight, A, rows, inner)
        whole = tokens @ weight.T if bias is None else torch.addmm(bias, tokens, weight.T)
        return whole.addmm_(inner, rows).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        tokens, weight, A, rows, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        through = grad @ rows.T
        to_x = to_a = to_rows = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(through, A).view(*grads[0].shape[:-1], A.shape[1])
        if ctx.needs_input_grad[3]:
            to_a = through.T @ tokens
        if ctx.needs_input_grad[4]:
            to_rows = inner.T @ grad
        return to_x, None, None, to_a, to_rows
