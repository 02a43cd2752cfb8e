"""A plain linear layer and a low-rank update in one autograd function: fewer and larger operations than layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Tensors = tuple[torch.Tensor, ...]


class ByHand(NamedTuple):
    """Factors of an update with their derivative written out, so that the whole layer is one step of autograd.

    `forward(*inputs)` gives (A (r, n), Bᵀ (r, m)); `backward(grad_A, grad_Bᵀ)` the gradients by the inputs. Neither
    may keep a graph: both run without one.
    """

    inputs: Tensors
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[torch.Tensor, torch.Tensor], Tensors]


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, B: torch.Tensor, A: torch.Tensor
) -> torch.Tensor:
    """x·(W + B·A)ᵀ + bias for x (..., n), frozen W (m, n) and bias (m,), B (m, r), A (r, n): (..., m)."""
    return _Linear.apply(x, weight, bias, _as_given, _as_given, A, B.T)  # type: ignore[no-any-return]


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, made: ByHand) -> torch.Tensor:
    """The same with the factors that `made` makes of its inputs."""
    return _Linear.apply(x, weight, bias, made.forward, made.backward, *made.inputs)  # type: ignore[no-any-return]


def _as_given(A: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return A, rows


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        make: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        unmake: Callable[[torch.Tensor, torch.Tensor], Tensors],
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        A, rows = make(*inputs)
        rows = rows.contiguous()  # thin products are several times faster with the thin side in rows
        tokens = x.reshape(-1, x.shape[-1])
        inner = tokens @ A.T
        ctx.save_for_backward(tokens, weight, A, rows, inner)
        ctx.unmake = unmake
        whole = tokens @ weight.T if bias is None else torch.addmm(bias, tokens, weight.T)
        return whole.addmm_(inner, rows).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        tokens, weight, A, rows, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        through, to_x = grad @ rows.T, None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(through, A).view(*grads[0].shape[:-1], A.shape[1])
        to_inputs = (None,) * (len(ctx.needs_input_grad) - 5)
        if any(ctx.needs_input_grad[5:]):
            to_inputs = ctx.unmake(through.T @ tokens, inner.T @ grad)
        return to_x, None, None, None, None, *to_inputs
