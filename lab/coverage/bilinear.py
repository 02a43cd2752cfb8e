"""The nearest update of a method whose ΔW(x, y) is linear in y for fixed x and affine in x for fixed y.

Variable projection (Golub and Pereyra 1973; Kaufman 1975): the best y for an x is a least-squares problem, solved exactly,
and what is left is a function of x alone. Descended by Newton's method: with M = ∂ΔW/∂y, T = ∂ΔW/∂x, R = ΔW − goal and
E = ⟨∂²ΔW/∂y∂x, R⟩, its Hessian is TTᵀ − (MTᵀ + E)ᵀ(MMᵀ)⁻¹(MTᵀ + E), because the second derivatives within x and within y
are zero. Where that is not positive definite, E is left out, which gives Gauss and Newton's. All of these products are
small, by the equation's structure: no Jacobian (parameters × d²) is ever made.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

Array = np.ndarray
STEPS = 60
SETTLED = 2e-5  # a step that takes off less than this share of the error is the last
PATIENCE = 1  # more steps of Gauss and Newton's after a Hessian that is not positive definite: the next is seldom
FLAT = 1e-13  # of the Gram matrix's mean diagonal, added to it: directions that change no ΔW stay where they are


class Bilinear(Protocol):
    """Sizes and products of one method; x and y are its two groups of trained numbers."""

    @property
    def x(self) -> int:
        """How many numbers x has."""
        ...

    def normal(self, x: Array, goal: Array) -> tuple[Array, Array]:
        """(MMᵀ, M·goal (y,)). MMᵀ is zero outside of equal blocks on its diagonal: (blocks, y/blocks, y/blocks)."""
        ...

    def delta(self, x: Array, y: Array) -> Array:
        """ΔW (d, d)."""
        ...

    def slope(self, x: Array, y: Array, left: Array) -> tuple[Array, Array, Array, Array]:
        """(T·left (x,), TTᵀ (x, x), MTᵀ (y, x), E (y, x)) for left = ΔW − goal (d, d)."""
        ...


class Found(NamedTuple):
    """Where a descent ended, and ‖goal − ΔW‖ there."""

    x: Array
    y: Array
    norm: float


def descend(pair: Bilinear, goal: Array, x: Array, steps: int = STEPS, settled: float = SETTLED) -> Found:
    """A minimum of ‖goal − ΔW‖ downhill from x, which need not be the least."""
    at, damping, wait = _inner(pair, x, goal), 1e-3, 0
    for _ in range(steps):
        slope, outer, across, bent = pair.slope(x, at.y, at.left)
        before, found, exact = at.norm, False, wait == 0
        hessian = _reduced(outer, at.root, across + bent if exact else across)
        for _ in range(8):
            step = _step(hessian, outer, slope, damping)
            if step is None and exact:
                hessian, exact, wait = _reduced(outer, at.root, across), False, PATIENCE + 1
                step = _step(hessian, outer, slope, damping)
            if step is not None:
                tried = _inner(pair, x - step, goal)
                if tried.norm < at.norm:
                    x, at, found, damping = x - step, tried, True, max(damping / 5, 1e-12)
                    break
            damping *= 4
        wait = max(0, wait - 1)
        if not found or before - at.norm <= settled * before or at.norm < 1e-10:
            break
    return Found(x, at.y, at.norm)


class _Inner(NamedTuple):
    """The best y for an x, ΔW − goal there and its norm, and a root of (MMᵀ)⁻¹, in blocks."""

    y: Array
    left: Array
    norm: float
    root: Array


def _inner(pair: Bilinear, x: Array, goal: Array) -> _Inner:
    gram, right = pair.normal(x, goal)
    root = _root(gram)
    y = (root @ (root.mT @ right.reshape(len(root), -1, 1))).ravel()
    left = pair.delta(x, y) - goal
    return _Inner(y, left, float(np.linalg.norm(left)), root)


def _root(gram: Array) -> Array:
    """L⁻ᵀ with gram + a little = LLᵀ, so that its inverse is L⁻ᵀL⁻¹; of each block."""
    side = gram.shape[-1]
    ridge = FLAT * (np.trace(gram, axis1=1, axis2=2).mean() / side or 1.0)
    for _ in range(8):
        try:
            return inverse(np.linalg.cholesky(gram + ridge * np.eye(side))).mT
        except np.linalg.LinAlgError:
            ridge *= 100
    raise np.linalg.LinAlgError("the Gram matrix is not finite")


def inverse(lower: Array) -> Array:
    """Of lower triangles, by halves: a sixth of the work of NumPy's inverse, which takes no notice of the zeros."""
    if (n := lower.shape[-1]) <= 64:
        return np.linalg.inv(lower)
    h, out = n // 2, np.zeros_like(lower)
    out[..., :h, :h], out[..., h:, h:] = inverse(lower[..., :h, :h]), inverse(lower[..., h:, h:])
    out[..., h:, :h] = -out[..., h:, h:] @ (lower[..., h:, :h] @ out[..., :h, :h])
    return out


def _reduced(outer: Array, root: Array, across: Array) -> Array:
    half = (root.mT @ across.reshape(len(root), -1, len(outer))).reshape(across.shape)
    return outer - half.T @ half


def _step(hessian: Array, outer: Array, slope: Array, damping: float) -> Array | None:
    """The damped step, or None where the matrix is not positive definite."""
    shifted = hessian + damping * (np.trace(outer) / len(outer) or 1.0) * np.eye(len(outer))
    try:
        root = inverse(np.linalg.cholesky(shifted))
    except np.linalg.LinAlgError:
        return None
    return root.T @ (root @ slope)
