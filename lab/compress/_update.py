"""The update of one layer as a matrix in double precision, kept as factors where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lab.methods.deltas import Delta
from lab.methods.spec import Layer

SVD = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """X (m, n) = left·right, left (m, R), right (R, n); without `right`, left is X itself."""

    left: torch.Tensor
    right: torch.Tensor | None = None

    def full(self) -> torch.Tensor:
        return self.left if self.right is None else self.left @ self.right

    def scaled(self, factor: float) -> Matrix:
        return Matrix(self.left * factor, self.right)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(x).all()) for x in (self.left, self.right) if x is not None)

    def times(self, Q: torch.Tensor) -> torch.Tensor:
        """X·Q."""
        return self.left @ Q if self.right is None else self.left @ (self.right @ Q)

    def transposed_times(self, Q: torch.Tensor) -> torch.Tensor:
        """Xᵀ·Q."""
        return self.left.T @ Q if self.right is None else self.right.T @ (self.left.T @ Q)

    def within(self, U: torch.Tensor, V: torch.Tensor) -> Matrix:
        """UᵀXV for U (m, a), V (n, b)."""
        if self.right is None:
            return Matrix(U.T @ self.left @ V)
        return Matrix(U.T @ self.left, self.right @ V)

    def plus(self, B: torch.Tensor, A: torch.Tensor) -> Matrix:
        """X + B·A."""
        if self.right is None:
            return Matrix(self.left + B @ A)
        return Matrix(torch.cat((self.left, B), dim=1), torch.cat((self.right, A)))

    def svd(self) -> SVD:
        """U (m, r), S (r,), Vh (r, n). Of factors by two QR decompositions and a core of side R (fewer than m and n)."""
        if self.right is None or self.left.shape[1] >= min(self.left.shape[0], self.right.shape[1]):
            return torch.linalg.svd(self.full(), full_matrices=False)
        Q, R = torch.linalg.qr(self.left)
        P, L = torch.linalg.qr(self.right.T)
        U, S, Vh = torch.linalg.svd(R @ L.T)
        return Q @ U, S, Vh @ P.T

    def square(self) -> float:
        """‖X‖² (Frobenius)."""
        if self.right is None or self.left.shape[1] >= min(self.left.shape[0], self.right.shape[1]):
            return float(self.full().square().sum())
        core = torch.linalg.qr(self.left)[1] @ torch.linalg.qr(self.right.T)[1].T  # no cancellation, as ⟨BᵀB, AAᵀ⟩ has
        return float(core.square().sum())


@dataclass(frozen=True)
class Goal:
    """What one layer's adapter is to come near to. `base` is the layer of the network."""

    layer: Layer
    delta: Delta
    base: torch.nn.Module

    def matrix(self) -> Matrix:
        """ΔW (m, n), on the CPU: made anew at every call, so that one layer's is held at a time."""
        pair = self.delta.factors()
        if pair is not None:
            return Matrix(pair[0].detach().double().cpu(), pair[1].detach().double().cpu())
        return Matrix(self.delta.dense().detach().double().cpu().reshape(self.layer.m, self.layer.n))

    def weight(self) -> torch.Tensor:
        """The base's W (m, n), float32, on the CPU."""
        from lab.methods._layer import as_matrix

        base: Any = self.base
        return as_matrix(base, base.weight.detach()).float().cpu()


def rounded(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As the parameters hold them."""
    return tuple(x.float().contiguous() for x in tensors)
