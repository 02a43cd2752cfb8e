"""The nearest update of a method whose ΔW(x, y) is linear in y for fixed x and affine in x for fixed y.

Variable projection (Golub and Pereyra 1973; Kaufman 1975): the best y for an x is a least-squares problem, solved exactly,
and what is left is a function of x alone. Descended by Newton's method: with M = ∂ΔW/∂y, T = ∂ΔW/∂x, R = ΔW − goal and
E = ⟨∂²ΔW/∂y∂x, R⟩, its Hessian is TTᵀ − (MTᵀ + E)ᵀ(MMᵀ)⁻¹(MTᵀ + E), because the second derivatives within x and within y
are zero. Where that is not positive definite, E is left out, which gives Gauss and Newton's. All of these products are
small, by the equation's structure: no Jacobian (parameters × d²) is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

Array = np.ndarray
STEPS = 60
SETTLED = 1e-5  # a step that takes off less than this share of the error is the last
FLAT = 1e-13  # of the Gram matrix's mean diagonal, added to it: directions that change no ΔW stay where they are


class Bilinear(Protocol):
    """Sizes and products of one method; x and y are its two groups of trained numbers."""

    @property
    def x(self) -> int:
        """How many numbers x has."""
        ...

    def normal(self, x: Array, goal: Array) -> tuple[Array, Array]:
        """(MMᵀ (y, y), M·goal (y,))."""
        ...

    def delta(self, x: Array, y: Array) -> Array:
        """ΔW (d, d)."""
        ...

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        """(T·left (x,), TTᵀ (x, x), MTᵀ (y, x), E (y, x)) for left = ΔW − goal (d, d)."""
        ...


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
        return (self.Bs.reshape(-1, r) @ (A @ A.T)).reshape(flat.shape) @ flat.T, flat @ (goal @ A.T).ravel()

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        A, B = self._a(x), np.tensordot(y, self.Bs, 1)
        k, r, n = self.As.shape
        a, rows = self.As.reshape(k, -1), self.As.reshape(-1, n)
        inner = (rows @ A.T).reshape(k, r, r).transpose(0, 2, 1).reshape(-1, r)  # (AᵢAᵀ)ᵀ, stacked
        across = (inner @ B.T).reshape(k, -1)  # ⟨BⱼA, BAᵢ⟩ = ⟨Bⱼ, B·AᵢAᵀ⟩
        bent = (rows @ left.T).reshape(k, -1)  # ⟨BⱼAᵢ, R⟩ = ⟨Bⱼ, R·Aᵢᵀ⟩
        outer = ((B.T @ B) @ self.As).reshape(a.shape) @ a.T
        return a @ (B.T @ left).ravel(), outer, self._turned @ across.T, self._turned @ bent.T


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
        return (scaled.T @ scaled) * self._outer, (scaled * (goal @ self.A.T)).sum(0)

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        rows = (self.B * y) @ self.A  # what bᵢ multiplies
        across = (x[:, None] * self.B * (rows @ self.A.T)).T
        bent = (self.B * (left @ self.A.T)).T
        return (rows * left).sum(1), np.diag((rows * rows).sum(1)), across, bent


class Found(NamedTuple):
    """Where a descent ended, and ‖goal − ΔW‖ there."""

    x: Array
    y: Array
    norm: float


def descend(pair: Bilinear, goal: Array, x: Array, steps: int = STEPS, settled: float = SETTLED) -> Found:
    """A minimum of ‖goal − ΔW‖ downhill from x, which need not be the least."""
    at, damping = _inner(pair, x, goal), 1e-3
    for _ in range(steps):
        slope, outer, across, bent = pair.slope(x, at.y, at.left)
        root, before, found = at.root, at.norm, False
        newton = _reduced(outer, root, across + bent)
        for _ in range(8):
            step = _step(newton, outer, slope, damping) if newton is not None else None
            if step is None:
                newton = None
                step = _step(_reduced(outer, root, across), outer, slope, damping)
            if step is not None:
                tried = _inner(pair, x - step, goal)
                if tried.norm < at.norm:
                    x, at, found, damping = x - step, tried, True, max(damping / 5, 1e-12)
                    break
            damping *= 4
        if not found or before - at.norm <= settled * before or at.norm < 1e-10:
            break
    return Found(x, at.y, at.norm)


class _Inner(NamedTuple):
    """The best y for an x, ΔW − goal there and its norm, and a root of (MMᵀ)⁻¹."""

    y: Array
    left: Array
    norm: float
    root: Array


def _inner(pair: Bilinear, x: Array, goal: Array) -> _Inner:
    gram, right = pair.normal(x, goal)
    root = _root(gram)
    y = root @ (root.T @ right)
    left = pair.delta(x, y) - goal
    return _Inner(y, left, float(np.linalg.norm(left)), root)


def _root(gram: Array) -> Array:
    """L⁻ᵀ with gram + a little = LLᵀ, so that its inverse is L⁻ᵀL⁻¹."""
    ridge = FLAT * (np.trace(gram) / len(gram) or 1.0)
    for _ in range(8):
        try:
            return _inverse(np.linalg.cholesky(gram + ridge * np.eye(len(gram)))).T
        except np.linalg.LinAlgError:
            ridge *= 100
    raise np.linalg.LinAlgError("the Gram matrix is not finite")


def _inverse(lower: Array) -> Array:
    """Of a lower triangle, by halves: a sixth of the work of NumPy's inverse, which takes no notice of the zeros."""
    if (n := len(lower)) <= 64:
        return np.linalg.inv(lower)
    h, out = n // 2, np.zeros_like(lower)
    out[:h, :h], out[h:, h:] = _inverse(lower[:h, :h]), _inverse(lower[h:, h:])
    out[h:, :h] = -out[h:, h:] @ (lower[h:, :h] @ out[:h, :h])
    return out


def _reduced(outer: Array, root: Array, across: Array) -> Array:
    half = root.T @ across
    return outer - half.T @ half


def _step(hessian: Array, outer: Array, slope: Array, damping: float) -> Array | None:
    """The damped step, or None where the matrix is not positive definite."""
    shifted = hessian + damping * (np.trace(outer) / len(outer) or 1.0) * np.eye(len(outer))
    try:
        root = _inverse(np.linalg.cholesky(shifted))
    except np.linalg.LinAlgError:
        return None
    return root.T @ (root @ slope)
