"""The nearest update to a given target: how well n trained numbers can do, whatever the optimizer and the data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.coverage import bilinear, hadamard, kronecker
from lab.coverage.closed import image_rank
from lab.coverage.maps import Array, UpdateMap, generator, weight
from lab.coverage.pairs import RowsPair
from lab.methods.builtin_factors import DiffuseKrona, Lokr
from lab.methods.spec import Layer

TARGETS = {
    "full": "a random matrix of full rank",
    "low": "a random matrix of rank d/8",
    "real": "what fine-tuning in full changed in a layer of the embedded base (its first d rows and columns)",
}
REAL = Path(__file__).resolve().parents[2] / "assets" / "coverage" / "difference.npz"  # made by _difference.py
MAX_FIT = 512  # parameters up to which an update is searched for, where no closed form or linear map gives it
STEPS, STARTS = 60, (1.0, 0.1)  # how far the starts are from the method's own
SETTLED = 3e-4  # share of the error that a step has to take off: less costs twice the time for half a per cent
INDEPENDENT = 1e-6  # share of the largest pivot of a Gram matrix; a smaller one may be rounding
PASSES = 4  # of projection


@functools.cache
def real() -> tuple[Array, Array]:
    """(W, ΔW), 64×64: the embedded base's weight and what fine-tuning it in full added."""
    with np.load(REAL, allow_pickle=False) as file:
        return file["W"].astype(np.float64), file["change"].astype(np.float64)


def base_weight(kind: str, d: int) -> Array | None:
    """The base weight that belongs to a target of norm 1, in the proportion that both have in the model; None: a random one."""
    if kind != "real":
        return None
    W, change = real()
    return W / np.linalg.norm(change[:d, :d])


def target(kind: str, d: int, seed: int) -> Array:
    """The matrix to reach (d, d), of norm 1: normal entries, a product of normal d×r and r×d matrices, r = ⌈d/8⌉, or the
    first d rows and columns of a real difference."""
    if kind == "real":
        made = real()[1][:d, :d]
        return made / np.linalg.norm(made)
    rng = generator(seed, "target", kind, d)
    r = -(-d // 8)
    made = rng.standard_normal((d, d)) if kind == "full" else rng.standard_normal((d, r)) @ rng.standard_normal((r, d))
    return made / np.linalg.norm(made)


def error(method: str, update: UpdateMap, knobs: Any, goal: Array, seed: int) -> tuple[float | None, str]:
    """(smallest ‖T − ΔW‖/‖T‖ found, how): exact where a closed form or a linear map allows, else an upper bound; None where
    the method has too many parameters to be searched."""
    if update.linear:
        return linear(update, goal), "least squares"
    if (r := image_rank(method, knobs)) is not None:
        return shifted(update, goal, r), "truncated SVD"
    if method == "nora":
        return nora(update.d, knobs, goal, seed), "projection and truncated SVD"
    if method == "gralora":
        return gralora(goal, knobs), "truncated SVD of each block"
    if method in KRONECKER:
        return kron(KRONECKER[method], knobs, goal, seed)
    if update.size > MAX_FIT:
        return None, ""
    if method == "loha":
        return hadamard_product(knobs, goal, seed)
    if update.pair is not None:
        return separable(update, goal, seed), f"variable projection, {many_starts(update.size)} starts"
    return nonlinear(update, goal, seed), f"Levenberg–Marquardt, {len(STARTS)} starts"


def tail(goal: Array, r: int) -> float:
    """‖T − T_r‖/‖T‖ for the best approximation of rank r (Eckart–Young): root of the sum of the other σᵢ²."""
    values = np.linalg.svd(goal, compute_uv=False)
    return float(np.linalg.norm(values[r:]) / np.linalg.norm(values))


def shifted(update: UpdateMap, goal: Array, r: int) -> float:
    """B·A + S with S = ΔW(0): as near as B·A comes to T − S, the truncated SVD of that."""
    left = goal - update.delta(np.zeros((1, update.size))).reshape(goal.shape)
    return tail(left, r) * float(np.linalg.norm(left) / np.linalg.norm(goal))


def linear(update: UpdateMap, goal: Array) -> float:
    """Distance to a subspace, or to one that is shifted by ΔW(0): the map's own projection, else least squares."""
    whole = float(np.linalg.norm(goal))
    if update.nearest is not None:
        return float(np.linalg.norm(goal - update.nearest(goal))) / whole
    t = goal.ravel() - update.delta(np.zeros((1, update.size)))[0]
    J = update.jacobian(np.zeros(update.size))
    left = _outside(J, t)
    if left is None:
        left = t - np.linalg.lstsq(J.T, t, rcond=None)[0] @ J
    return float(np.linalg.norm(left)) / whole


def _outside(J: Array, t: Array) -> Array | None:
    """The part of t (D,) orthogonal to the rows of J (p, D), through their Gram matrix, a tenth of the work of singular
    values; None where the rows are dependent. A pass leaves what rounding takes of it, up to cond(J)² times 1e-16; the next
    pass takes that off in turn."""
    try:
        lower = np.linalg.cholesky(J @ J.T)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diag(lower)
    if len(J) > len(t) or pivots.min() <= INDEPENDENT * pivots.max():
        return None
    root = bilinear.inverse(lower)
    for _ in range(PASSES):
        t = t - (root.T @ (root @ (J @ t))) @ J
    return t


def nora(d: int, knobs: Any, goal: Array, seed: int) -> float:
    """U·X·Vᵀ with X + C of rank at most r_inner (C the start value, taken off): the part of T outside of the frames is
    lost, and inside, X + C is the truncated SVD of UᵀTV + C. C is of W's size, so the error depends on how large T is beside W
    (here ‖T‖ = 1, ‖W‖ ≈ √d): a rank that is spent on taking the start off is not there for T."""
    from lab.methods.nora import Nora

    r, i = Nora().outer_rank(Layer("layer", d, d), knobs), knobs.r_inner
    U, S, Vt = np.linalg.svd(weight(d, seed))
    inside = U[:, :r].T @ goal @ Vt[:r].T
    C = np.diag(np.where(np.arange(r) < i, S[:r], 0.0)) if knobs.identity_init else np.zeros((r, r))
    values = np.linalg.svd(inside + C, compute_uv=False)
    lost = max(0.0, np.linalg.norm(goal) ** 2 - np.linalg.norm(inside) ** 2)
    return float(np.sqrt(lost + (values[i:] ** 2).sum()) / np.linalg.norm(goal))


def gralora(goal: Array, knobs: Any) -> float:
    k, s = knobs.blocks, knobs.r // knobs.blocks
    side = len(goal) // k
    blocks = goal.reshape(k, side, k, side).transpose(0, 2, 1, 3).reshape(-1, side, side)
    left = sum((np.linalg.svd(b, compute_uv=False)[s:] ** 2).sum() for b in blocks)
    return float(np.sqrt(left) / np.linalg.norm(goal))


KRONECKER = {"lokr": Lokr(), "diffusekrona": DiffuseKrona()}


def kron(row: Lokr, knobs: Any, goal: Array, seed: int) -> tuple[float, str]:
    d = len(goal)
    m1, _, n1, _, _, full = row.shapes(Layer("layer", d, d), knobs)
    if full:
        return kronecker.full(goal, m1, n1) / float(np.linalg.norm(goal)), "rearrangement and SVD"
    found = kronecker.low_rank(goal, m1, n1, knobs.r, generator(seed, "fit", d, knobs.r))
    return found / float(np.linalg.norm(goal)), f"alternating SVD, {2 * kronecker.STARTS} starts"


def hadamard_product(knobs: Any, goal: Array, seed: int) -> tuple[float, str]:
    """LoHa, from starts near the truncated SVD, more of them where they cost little; the best, so an upper bound."""
    d, r = len(goal), knobs.r
    draws = min(8, max(2, (1 << 19) // (4 * d * r) ** 2))
    many = draws * len(hadamard.NEAR)
    starts = (
        hadamard.Factors.near(goal, r, generator(seed, "fit", i, d, r), size)
        for i in range(draws)
        for size in hadamard.NEAR
    )
    found = min(hadamard.descend(goal, start)[0] for start in starts)
    return found / float(np.linalg.norm(goal)), f"Levenberg–Marquardt, {many} starts"


def many_starts(parameters: int) -> int:
    """Of variable projection: more where they cost little. A curve at d = 32 takes less than 2 s with these."""
    return 6 if parameters <= 128 else 3 if parameters <= 256 else 2


def separable(update: UpdateMap, goal: Array, seed: int, starts: int | None = None) -> float:
    """Variable projection from random points (`lab.coverage.bilinear`); the best of them, so an upper bound."""
    assert update.pair is not None
    many = starts or many_starts(update.size)
    pair = update.pair
    near = [pair.near(goal)] if isinstance(pair, RowsPair) else []
    drawn = (generator(seed, "fit", i, update.d, update.size).standard_normal(pair.x) for i in range(many - len(near)))
    # With a free scale a row the error falls slowly to the end; without, half of the
    # time goes into its last 0.4 %.
    settled = bilinear.SETTLED if isinstance(pair, RowsPair) else 2.5 * bilinear.SETTLED
    found = (bilinear.descend(pair, goal, x, settled=settled).norm for x in (*near, *drawn))
    return min(found) / float(np.linalg.norm(goal))


def nonlinear(
    update: UpdateMap,
    goal: Array,
    seed: int,
    steps: int = STEPS,
    starts: Sequence[float] = STARTS,
    settled: float = SETTLED,
) -> float:
    """Levenberg–Marquardt with the exact Jacobian, from a random point for each of `starts`, at 1 as far from the method's own
    start as its draws are; the best of them, so an upper bound. It ends when a step takes off less than `settled`."""
    t, found = goal.ravel(), []
    for number, size in enumerate(starts):
        noise = size * generator(seed, "fit", number, update.d, update.size).standard_normal(update.size)
        made = update.delta(update.about(noise)[None])[0]
        noise *= min(1.0, (np.linalg.norm(t) / (np.linalg.norm(made) or 1.0)) ** 0.5)
        found.append(_descend(update, t, update.about(noise), steps, settled))
    return min(found) / float(np.linalg.norm(t))


def _descend(update: UpdateMap, t: Array, theta: Array, steps: int, settled: float) -> float:
    damping, left = 1e-3, update.delta(theta[None])[0] - t
    norm = float(np.linalg.norm(left))
    for _ in range(steps):
        J = update.jacobian(theta)
        gram, slope = J @ J.T, J @ left
        before = norm
        for _ in range(8):
            ridge = damping * (np.trace(gram) / len(gram) or 1.0)
            try:
                tried = theta - np.linalg.solve(gram + ridge * np.eye(len(gram)), slope)
            except np.linalg.LinAlgError:
                damping *= 10
                continue
            new = update.delta(tried[None])[0] - t
            size = float(np.linalg.norm(new))
            if size < norm:
                theta, left, norm, damping = tried, new, size, max(damping / 5, 1e-12)
                break
            damping *= 4
        if before - norm <= settled * before or norm < 1e-10:
            break
    return norm
