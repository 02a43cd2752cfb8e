"""Optimizers of methods that are, or need, one of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class StillAdamW(torch.optim.AdamW):
    """AdamW that leaves entries alone whose gradient is exactly zero: frozen means still, not coasting on momentum."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        before = [(p, p.clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        result = super().step(closure)
        for p, old in before:
            p.copy_(torch.where(p.grad == 0, old, p))
        return result


class LoraProAdamW(torch.optim.Optimizer):
    """AdamW on pairs (A (r, n), B (m, r), scale s) whose gradients are first set right, as LoRA-Pro does.

    `pairs` gives the groups' parameters. With `full`, the two moments are those of the m×n gradient that the pair
    stands for, and the step they give is projected back to the pair; otherwise they are the corrected gradients' own.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[torch.nn.Parameter, torch.nn.Parameter, float]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        full: bool = False,
    ) -> None:
        groups = [{"params": [A, B], "scale": scale} for A, B, scale in pairs]
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "full": full, "scale": 1.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            A, B = group["params"]
            if A.grad is None or B.grad is None:
                continue
            if group["full"]:
                self._full(group, A, B, A.grad, B.grad)
            else:
                for p, g in zip((A, B), lora_pro(A, B, A.grad, B.grad, group["scale"]), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(self._adam(p, g, group), alpha=group["lr"])
        return loss

    def _full(
        self, group: dict[str, Any], A: torch.Tensor, B: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor
    ) -> None:
        s, lr = group["scale"], group["lr"]
        g_a, g_b = lora_pro(A, B, grad_a, grad_b, s, gauge=False)  # X drops out of s(B·g_A + g_B·A)
        direction = self._adam(A, s * (B @ g_a + g_b @ A), group)  # (m, n)
        d_a, d_b = lora_pro(A, B, s * B.T @ direction, s * direction @ A.T, s)
        shrink = math.sqrt(max(0.0, 1 - lr * group["weight_decay"]))  # of the product: 1 − lr·weight_decay
        A.mul_(shrink).sub_(d_a, alpha=lr)
        B.mul_(shrink).sub_(d_b, alpha=lr)

    def _adam(self, key: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Adam's direction for a gradient, with its moments kept under `key`."""
        state, (b1, b2) = self.state[key], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1
        step = float(state["step"])
        state["exp_avg"].lerp_(grad, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = (state["exp_avg_sq"] / (1 - b2**step)).sqrt_().add_(group["eps"])
        return (state["exp_avg"] / (1 - b1**step)) / denominator


def lora_pro(
    A: torch.Tensor, B: torch.Tensor, g_a: torch.Tensor, g_b: torch.Tensor, s: float, *, gauge: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of gradients whose effect s(B·g_A + g_B·A) on W is nearest to the full gradient (LoRA-Pro, Theorem 2.1).

    g_A = (BᵀB)⁻¹·∇A/s² + X·A,  g_B = (I − B(BᵀB)⁻¹Bᵀ)·∇B·(AAᵀ)⁻¹/s² − B·X. X changes nothing of the effect; `gauge`
    takes the one that keeps the pair nearest to the plain gradients: BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹·∇A·Aᵀ/s² (Theorem 2.3).
    """
    gram_a, gram_b = A @ A.T, B.T @ B
    inverse_b = _inverse(gram_b)
    right = g_b @ _inverse(gram_a) / s**2
    first = inverse_b @ g_a / s**2
    second = right - B @ (inverse_b @ (B.T @ right))
    if not gauge:
        return first, second
    X = _sylvester(gram_b, gram_a, -first @ A.T)
    return first + X @ A, second - B @ X


def _inverse(gram: torch.Tensor, damping: float = 1e-8) -> torch.Tensor:
    """Pseudo-inverse of a Gram matrix with the authors' damping, in double precision."""
    damped = gram.double() + damping * torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    return torch.linalg.pinv(damped, hermitian=True).to(gram.dtype)


def _sylvester(P: torch.Tensor, Q: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """X with P·X + X·Q = C for symmetric positive semi-definite P, Q: by their eigenvectors, in double precision."""
    p, U = torch.linalg.eigh(P.double())
    q, V = torch.linalg.eigh(Q.double())
    sums = (p[:, None] + q[None, :]).clamp_min(1e-12)
    return (U @ ((U.T @ C.double() @ V) / sums) @ V.T).to(C.dtype)
