"""Spectra of updates, their place among the base's singular directions, and the overlap of two of them.

Everything is computed from the factors where there are any: with B = Q_B·R_B and Aᵀ = Q_A·R_A, the singular values of
B·A are those of the r×r matrix R_B·R_Aᵀ, and its vectors are Q_B·u and Q_A·v. Only an update without factors is laid out
as a matrix; its vectors are those of the smaller Gram matrix. All in double precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lab import svd

if TYPE_CHECKING:
    from lab.methods.deltas import Delta

TOLERANCE = 1e-6  # of the largest singular value: what is below is rounding of the file's numbers, and not counted
ENERGY = 0.9  # share of ‖ΔW‖² that the directions hold which overlap is measured on
INTRUDER_VECTORS = 10  # k and ε of Shuttleworth et al. 2024 (arXiv 2410.21228), Algorithm 1
INTRUDER_COSINE = 0.5
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of min(m, n): the k at which the subspace curve is read
TOP = 0.1  # of min(m, n): the "top" directions of W in the table


@dataclass(frozen=True)
class Svd:
    """ΔW = U·diag(S)·Vh, double precision, σ above TOLERANCE alone: U (m, p), S (p,) descending, Vh (p, n)."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def m(self) -> int:
        return self.U.shape[0]

    @property
    def n(self) -> int:
        return self.Vh.shape[1]


def decompose(delta: Delta) -> Svd:
    """The singular triplets of an update; a convolution's kernel counts to its inputs: (out, in·kh·kw)."""
    pair = delta.factors()
    if pair is not None and pair[0].shape[1] < min(pair[0].shape[0], pair[1].shape[1]):
        B, A = (x.double() for x in pair)
        Qb, Rb = torch.linalg.qr(B)
        Qa, Ra = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
        keep = _kept(S)
        return Svd(Qb @ U[:, :keep], S[:keep], Vh[:keep] @ Qa.T)
    return _by_gram(delta.dense().double().flatten(1))


def _by_gram(W: torch.Tensor) -> Svd:
    """From the eigenvectors of the smaller Gram matrix, exact above σ₁·10⁻⁸ (lab.svd.by_gram)."""
    if W.shape[0] < W.shape[1]:
        flipped = _by_gram(W.T)
        return Svd(flipped.Vh.T, flipped.S, flipped.U.T)
    values, vectors = torch.linalg.eigh(W.T @ W)
    S = values.flip(0).clamp_min(0).sqrt()
    keep = _kept(S)
    V = vectors.flip(1)[:, :keep]
    return Svd((W @ V) / S[:keep], S[:keep], V.T)


def _kept(S: torch.Tensor) -> int:
    return int((S / S[0] > TOLERANCE).sum()) if S.numel() and float(S[0]) > 0 else 0


def numbers(S: torch.Tensor) -> dict[str, Any]:
    """What a spectrum says. S: the singular values, descending, without what is rounding.

    norm: ‖ΔW‖ (Frobenius); spectral: σ₁; rank: how many
    effective_rank: exp of the entropy of p_i = σ_i / Σσ (Roy and Vetterli 2007, definition 1)
    stable_rank: ‖ΔW‖² / σ₁²
    directions_90: how many of the largest hold 90 % of ‖ΔW‖²
    """
    if not S.numel():
        return {"norm": 0.0, "spectral": 0.0, "rank": 0, "effective_rank": 0.0, "stable_rank": 0.0, "directions_90": 0}
    energy = S.square()
    p = S / S.sum()
    return {
        "norm": float(energy.sum().sqrt()),
        "spectral": float(S[0]),
        "rank": S.numel(),
        "effective_rank": float((-(p * p.log()).sum()).exp()),
        "stable_rank": float(energy.sum() / energy[0]),
        "directions_90": directions(S),
    }


def directions(S: torch.Tensor, share: float = ENERGY) -> int:
    """How many of the largest singular values hold this share of the energy."""
    total = S.square().cumsum(0)
    return int((total < share * total[-1] * (1 - 1e-12)).sum()) + 1


def points(S: torch.Tensor, most: int = 96) -> list[list[float]]:
    """A spectrum as [number, σ] pairs to draw: all of it, or `most` points that are dense at its start."""
    count = S.numel()
    if count <= most:
        index = range(count)
    else:
        steps = torch.logspace(0, math.log10(count), most, dtype=torch.double).round().long()
        index = sorted({*(int(i) - 1 for i in steps), *range(16), count - 1})
    return [[i + 1, float(S[i])] for i in index]


# -- beside the base's weight ---------------------------------------------------------------------------
def subspace(found: Svd, weight: torch.Tensor) -> dict[str, Any]:
    """How much of ΔW lies in the leading singular directions of W.

    `curve`: for each k, the shares ‖U_kᵀΔW‖²/‖ΔW‖² (outputs), ‖ΔW·V_k‖²/‖ΔW‖² (inputs) and ‖U_kᵀΔW·V_k‖²/‖ΔW‖² (both).
    A random ΔW has k/m, k/n and k²/(m·n). `outputs`, `inputs`, `both` are those of the top tenth, k = ⌈min(m, n)/10⌉.
    """
    size = min(found.m, found.n)
    base = svd.basis(weight.flatten(1), size)
    total = found.S.square().sum()
    left = base.U.double().T @ (found.U * found.S)  # (size, p): coordinates of ΔW's columns
    right = base.Vh.double() @ found.Vh.T  # (size, p)
    outputs = left.square().sum(1).cumsum(0) / total
    inputs = (right * found.S).square().sum(1).cumsum(0) / total
    both = (left @ right.T).square().cumsum(0).cumsum(1).diagonal() / total
    curve = []
    for share in SHARES:
        k = max(1, math.ceil(share * size))
        curve.append([k, *(min(1.0, float(x[k - 1])) for x in (outputs, inputs, both))])
    k = max(1, math.ceil(TOP * size))
    shares = {"outputs": float(outputs[k - 1]), "inputs": float(inputs[k - 1]), "both": float(both[k - 1])}
    chance = {"outputs": k / found.m, "inputs": k / found.n, "both": k * k / (found.m * found.n)}
    relative = float(total.sqrt() / weight.double().norm().clamp_min(1e-30))
    return {"k": k, **shares, "chance": chance, "curve": curve, "relative_norm": relative}


def intruders(
    found: Svd, weight: torch.Tensor, k: int = INTRUDER_VECTORS, cosine: float = INTRUDER_COSINE
) -> dict[str, Any]:
    """Leading directions of W + ΔW that W does not have (Shuttleworth et al. 2024, Algorithm 1).

    Of the k first left singular vectors of W + ΔW, those whose |cosine| to every left singular vector of W is below
    `cosine`. `vectors`: [number, singular value, largest |cosine|] of each of the k.
    """
    W = weight.flatten(1)
    base = svd.basis(W, min(W.shape))
    changed = W.double() + (found.U * found.S) @ found.Vh
    k = min(k, min(W.shape))
    new = svd.cut(changed.float(), k)
    cosines = (base.U.double().T @ new.U.double()).abs().amax(dim=0)
    vectors = [[j + 1, float(new.S[j]), min(1.0, float(cosines[j]))] for j in range(k)]
    return {"intruders": sum(c < cosine for _, _, c in vectors), "vectors": vectors}


# -- beside another update -------------------------------------------------------------------------------
def overlap(a: Svd, b: Svd) -> dict[str, Any]:
    """How far two updates of one layer move it in the same directions.

    On each one's directions that hold 90 % of its energy (i and j of them), outputs and inputs apart: `cosines` of the
    principal angles between the two spaces, and φ = Σ cos² / min(i, j) as in LoRA, section 7.2 (0: orthogonal, 1: the
    smaller lies in the larger). Two random spaces have φ = max(i, j)/m. `cosine`: ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖·‖ΔW_b‖).
    """
    i, j = directions(a.S), directions(b.S)
    both = {}
    for side, left, right in (("outputs", a.U, b.U), ("inputs", a.Vh.T, b.Vh.T)):
        cosines = torch.linalg.svdvals(left[:, :i].T @ right[:, :j]).clamp(0, 1)
        both[side] = float(cosines.square().sum() / min(i, j))
        both[f"{side}_cosines"] = [float(c) for c in cosines[:64]]
        both[f"{side}_chance"] = min(1.0, max(i, j) / left.shape[0])
    inner = ((a.U.T @ b.U) * (a.S[:, None] * (a.Vh @ b.Vh.T) * b.S)).sum()
    return {**both, "directions": [i, j], "cosine": float(inner / (a.S.norm() * b.S.norm()))}
