"""Methods whose ΔW is bilinear in two groups of trained numbers, as `lab.coverage.bilinear` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lab.coverage.bilinear import Array


@dataclass(frozen=True)
class NolaPair:
    """B(β)·(A₀ + A(α)): x = α, y = β. As (k, r, n), Bs (l, m, r), A0 (r, n), for ΔW (m, n)."""

    As: Array
    Bs: Array
    A0: Array

    @property
    def x(self) -> int:
        return len(self.As)

    def _a(self, x: Array) -> Array:
        return self.A0 + np.tensordot(x, self.As, 1)

    def delta(self, x: Array, y: Array) -> Array:
        return np.tensordot(y, self.Bs, 1) @ self._a(x)

    @cached_property
    def _turned(self) -> Array:
        """Bⱼᵀ, flat (l, r·m): products with all Aᵢ at once come out in this order."""
        return np.ascontiguousarray(self.Bs.transpose(0, 2, 1)).reshape(len(self.Bs), -1)

    def normal(self, x: Array, goal: Array) -> tuple[Array, Array]:
        A, flat, r = self._a(x), self.Bs.reshape(len(self.Bs), -1), self.A0.shape[0]
        R = np.linalg.qr(A.T).R  # ⟨BᵢA, BⱼA⟩ = ⟨BᵢRᵀ, BⱼRᵀ⟩
        made = (self.Bs.reshape(-1, r) @ R.T).reshape(len(flat), -1)
        return (made @ made.T)[None], flat @ (goal @ A.T).ravel()

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        A, B = self._a(x), np.tensordot(y, self.Bs, 1)
        k, r, n = self.As.shape
        a, rows = self.As.reshape(k, -1), self.As.reshape(-1, n)
        inner = (rows @ A.T).reshape(k, r, r).transpose(0, 2, 1).reshape(-1, r)  # (AᵢAᵀ)ᵀ, stacked
        across = (inner @ B.T).reshape(k, -1)  # ⟨BⱼA, BAᵢ⟩ = ⟨Bⱼ, B·AᵢAᵀ⟩
        bent = (rows @ left.T).reshape(k, -1)  # ⟨BⱼAᵢ, R⟩ = ⟨Bⱼ, R·Aᵢᵀ⟩
        made = (np.linalg.qr(B).R @ self.As).reshape(k, -1)  # a product with its own transpose costs half
        return a @ (B.T @ left).ravel(), made @ made.T, self._turned @ across.T, self._turned @ bent.T


@dataclass(frozen=True)
class VeraPair:
    """diag(b)·B·diag(d)·A: x = b, y = d. B (side, r), A (r, side)."""

    B: Array
    A: Array

    @property
    def x(self) -> int:
        return len(self.B)

    @cached_property
    def _outer(self) -> Array:
        return self.A @ self.A.T

    def delta(self, x: Array, y: Array) -> Array:
        return x[:, None] * ((self.B * y) @ self.A)

    def normal(self, x: Array, goal: Array) -> tuple[Array, Array]:
        scaled = x[:, None] * self.B
        return ((scaled.T @ scaled) * self._outer)[None], (scaled * (goal @ self.A.T)).sum(0)

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        rows = (self.B * y) @ self.A  # what bᵢ multiplies
        across = (x[:, None] * self.B * (rows @ self.A.T)).T
        bent = (self.B * (left @ self.A.T)).T
        return (rows * left).sum(1), np.diag((rows * rows).sum(1)), across, bent


@dataclass(frozen=True)
class RowsPair:
    """H∘(B·A) + diag(c)·E: x = A (r·d), y = the rows of (B | c), r + 1 numbers each; without E no c. H, E (d, d).

    HiRA: H = W. DoRA: H = 1, E = W. DoRA's rows are gᵢ·(wᵢ + bᵢA)/‖wᵢ + bᵢA‖ − wᵢ with gᵢ free: put 1 + cᵢ for
    gᵢ/‖wᵢ + bᵢA‖ and B's row over it for bᵢ, and they are cᵢ·wᵢ + BᵢA. Every cᵢ ≠ −1 comes from some gᵢ and bᵢ, and cᵢ = −1 is a
    limit of such, so the smallest error is the same, and the magnitudes, with B, are a least-squares problem.

    Row i is yᵢ times a matrix Mᵢ of r + 1 rows, Hᵢ∘A_k and Eᵢ, so MMᵀ has a block for each row; entry (i, j) depends on
    column j of A alone, so TTᵀ has a block for each column.
    """

    r: int
    H: Array
    E: Array | None = None

    @property
    def x(self) -> int:
        return self.r * self.H.shape[1]

    def near(self, goal: Array) -> Array:
        """A start for x: the leading right singular vectors of the goal with H's signs taken off, which would be the answer
        were all of H's entries of one size and c zero."""
        return np.linalg.svd(np.sign(self.H) * goal)[2][: self.r].ravel()

    def _m(self, x: Array) -> Array:
        """M (d, r + 1, d)."""
        made = self.H[:, None, :] * x.reshape(1, self.r, -1)
        return made if self.E is None else np.concatenate((made, self.E[:, None, :]), axis=1)

    def delta(self, x: Array, y: Array) -> Array:
        M = self._m(x)
        return (y.reshape(len(M), 1, -1) @ M)[:, 0]

    def normal(self, x: Array, goal: Array) -> tuple[Array, Array]:
        M = self._m(x)
        return M @ M.mT, (M @ goal[:, :, None]).ravel()

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        (d, n), r = self.H.shape, self.r
        B = y.reshape(d, -1)[:, :r]
        outer, across = np.zeros((r, n, r, n)), np.empty((d, y.size // d, r, n))
        columns = np.arange(n)
        products = (B[:, :, None] * B[:, None, :]).reshape(d, -1)
        outer[:, columns, :, columns] = ((self.H**2).T @ products).reshape(n, r, r)
        np.multiply(self._m(x)[:, :, None, :], (B[:, :, None] * self.H[:, None, :])[:, None], out=across)
        bent = np.zeros_like(across)
        bent[:, np.arange(r), np.arange(r)] = (self.H * left)[:, None, :]
        flat = (y.size, r * n)
        return (B.T @ (self.H * left)).ravel(), outer.reshape(r * n, r * n), across.reshape(flat), bent.reshape(flat)
