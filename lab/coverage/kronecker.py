"""The nearest Kronecker product: LoKr's and DiffuseKronA's best reachable error."""

from __future__ import annotations

import numpy as np

from lab.coverage.bilinear import Array

SWEEPS = 1000
SETTLED = 1e-9  # a sweep that gains less than this share of ‖T‖² is the last
STARTS = 6  # singular vectors to start from, and as many random vectors


def rearranged(goal: Array, rows: int, columns: int) -> Array:
    """Van Loan and Pitsianis' (1993) R (rows·columns, d²/(rows·columns)): block (a, b) of rows×columns blocks becomes one
    row. Then R(C ⊗ D) = vec(C)·vec(D)ᵀ, and R keeps the Frobenius norm."""
    high, wide = goal.shape[0] // rows, goal.shape[1] // columns
    return goal.reshape(rows, high, columns, wide).transpose(0, 2, 1, 3).reshape(rows * columns, high * wide)


def full(goal: Array, rows: int, columns: int) -> float:
    """min ‖goal − C ⊗ D‖ over all C (rows, columns) and D: the distance of R to the matrices of rank one, so by
    Eckart and Young all of its singular values but the first."""
    return float(np.linalg.norm(np.linalg.svd(rearranged(goal, rows, columns), compute_uv=False)[1:]))


def low_rank(goal: Array, rows: int, columns: int, r: int, rng: np.random.Generator) -> float:
    """min ‖goal − C ⊗ D‖ over D of rank at most r: an upper bound, the best of several starts.

    For C of norm one, ‖goal − C ⊗ D‖² = ‖goal‖² − ‖D̂‖² + ‖D̂ − D‖² with D̂ = Σ C_ab·T_ab the sum of goal's blocks: the best D is
    D̂'s truncated SVD, and the best C for that D is proportional to ⟨T_ab, D⟩. By turns neither increases the error.
    """
    R = rearranged(goal, rows, columns)
    high, wide = goal.shape[0] // rows, goal.shape[1] // columns
    starts = [*np.linalg.svd(R)[0].T[:STARTS], *rng.standard_normal((STARTS, len(R)))]
    gained = max(_alternate(R, c, (high, wide), r) for c in starts)
    return float(np.sqrt(max(0.0, np.linalg.norm(goal) ** 2 - gained)))


def _alternate(R: Array, c: Array, shape: tuple[int, int], r: int) -> float:
    """The part of ‖goal‖² that is reached from c."""
    gained, enough = 0.0, SETTLED * float(np.linalg.norm(R) ** 2)
    for _ in range(SWEEPS):
        c = c / (np.linalg.norm(c) or 1.0)
        U, S, Vt = np.linalg.svd((c @ R).reshape(shape), full_matrices=False)
        last, gained = gained, float((S[:r] ** 2).sum())
        if gained - last <= enough:
            break
        c = R @ ((U[:, :r] * S[:r]) @ Vt[:r]).ravel()
    return gained
