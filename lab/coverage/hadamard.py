"""The nearest LoHa update: Levenberg and Marquardt's steps on (B₁A₁)∘(B₂A₂) without its Jacobian.

Entry (i, j) depends on row i of (B₁ | B₂) and on column j of (A₁ | A₂) alone. So of the normal equations the part of the
rows is one 2r×2r block a row, that of the columns one a column, and eliminating the rows (a Schur complement, as in bundle
adjustment) leaves 2r·d unknowns in place of 4r·d, with no matrix of parameters × d².
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lab.coverage.bilinear import SETTLED, Array

STEPS = 60
NEAR = (0.1, 0.5)  # sizes of the random numbers about a start: either leads to the lower minimum about as often


class Factors(NamedTuple):
    """Rows (B₁ | B₂) (d, 2, r) and columns (A₁ | A₂)ᵀ (d, 2, r)."""

    rows: Array
    columns: Array

    @classmethod
    def near(cls, goal: Array, r: int, rng: np.random.Generator, size: float) -> Factors:
        """A start: B₁A₁ the goal's truncated SVD, B₂A₂ all ones, and random numbers of the given size in all else, without
        which B₂A₂ would keep its rank of one. Random factors alone end in minima a few times as high."""
        U, S, Vt = np.linalg.svd(goal)
        rows, columns = size * rng.standard_normal((2, len(goal), 2, r))
        rows[:, 0], columns[:, 0] = U[:, :r] * np.sqrt(S[:r]), Vt[:r].T * np.sqrt(S[:r])
        rows[:, 1, 0] += 1
        columns[:, 1, 0] += 1
        return cls(rows, columns)

    def products(self) -> tuple[Array, Array]:
        """B₁A₁ and B₂A₂, each (d, d)."""
        return self.rows[:, 0] @ self.columns[:, 0].T, self.rows[:, 1] @ self.columns[:, 1].T

    def moved(self, rows: Array, columns: Array) -> Factors:
        return Factors(self.rows - rows.reshape(self.rows.shape), self.columns - columns.reshape(self.columns.shape))


def descend(goal: Array, at: Factors, steps: int = STEPS) -> tuple[float, Factors]:
    """(‖goal − ΔW‖, where) at a minimum downhill from `at`, which need not be the least."""
    P, Q = at.products()
    left, damping = P * Q - goal, 1e-3
    norm = float(np.linalg.norm(left))
    for _ in range(steps):
        before, found, system = norm, False, _System(at, P, Q, left)
        for _ in range(8):
            tried = at.moved(*system.step(damping))
            P, Q = tried.products()
            tried_left = P * Q - goal
            size = float(np.linalg.norm(tried_left))
            if size < norm:
                at, left, norm, found, damping = tried, tried_left, size, True, max(damping / 5, 1e-12)
                break
            damping *= 4
        if not found or before - norm <= SETTLED * before or norm < 1e-10:
            break
    return norm, at


class _System:
    """Normal equations at a point: H the rows' blocks (d, 2r, 2r), G the columns', X between them (d, 2r, d·2r)."""

    def __init__(self, at: Factors, P: Array, Q: Array, left: Array) -> None:
        d, width = len(P), at.rows[0].size
        others = np.stack((Q, P), axis=2)[..., None]  # what each factor's product is multiplied by, (d, d, 2, 1)
        by_row = (others * at.columns[None]).reshape(d, d, width)  # ∂ΔWᵢⱼ/∂rowᵢ
        by_column = (others * at.rows[:, None]).reshape(d, d, width)  # ∂ΔWᵢⱼ/∂columnⱼ
        across = by_column.transpose(1, 0, 2)
        self.H, self.G = by_row.mT @ by_row, across.mT @ across
        self.X = (by_row.mT[..., None] * by_column[:, None]).reshape(d, width, d * width)
        self.right = (by_row.mT @ left[..., None]), (across.mT @ left.T[..., None]).ravel()
        self.size = (np.trace(self.H, axis1=1, axis2=2).sum() + np.trace(self.G, axis1=1, axis2=2).sum()) / (
            2 * d * width
        ) or 1.0

    def step(self, damping: float) -> tuple[Array, Array]:
        """The damped step of rows and columns."""
        d, width = self.H.shape[:2]
        ridge = damping * self.size * np.eye(width)
        root = np.linalg.inv(np.linalg.cholesky(self.H + ridge))
        half, top = root @ self.X, root @ self.right[0]
        flat = half.reshape(d * width, -1)
        schur = -(flat.T @ flat)
        blocks = schur.reshape(d, width, d, width)
        each = np.arange(d)
        blocks[each, :, each] += self.G + ridge
        columns = np.linalg.solve(schur, self.right[1] - flat.T @ top.ravel())
        return root.mT @ (top - half @ columns[:, None]), columns
