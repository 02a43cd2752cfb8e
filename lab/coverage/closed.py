"""Closed forms of the span, the local dimension and the rank of one update, on one d×d layer.

All hold for generic frozen tensors and generic trained values (probability one for random ones); tests hold them against
measurements. Notation: M_r, the matrices of rank at most r, is a variety of dimension r(2d − r) that spans everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.methods.builtin_factors import Lokr
from lab.methods.spec import Layer


@dataclass(frozen=True)
class Closed:
    """Dimension of the span (of d²), largest rank of the Jacobian, matrix rank of a generic update."""

    span: int
    local: int
    rank: int


def low_rank(d: int, r: int) -> Closed:
    """ΔW = B·A, both trained. The image is M_r. Its tangent space at B·A is {δB·A + B·δA}: 2dr parameters less the r²
    of B → BG, A → G⁻¹A, so r(2d − r). Every rank-one matrix is in it, and those span all d²."""
    r = min(r, d)
    return Closed(d * d, r * (2 * d - r), r)


def _lora(d: int, knobs: Any) -> Closed:
    return low_rank(d, knobs.r)


def _block_lora(d: int, knobs: Any) -> Closed:
    """The blocks add up to one B (d × r/N): LoRA of rank r/N."""
    return low_rank(d, knobs.r // knobs.blocks)


def _frozen_a(d: int, knobs: Any) -> Closed:
    """A frozen of rank r: every row of ΔW is any vector of A's row space. Linear, so span and local are both d·r."""
    r = min(knobs.r, d)
    return Closed(d * r, d * r, r)


def _dora(d: int, knobs: Any) -> Closed:
    """Row i of W' is gᵢ times the direction of wᵢ + bᵢA. For r < d the generic wᵢ is outside of A's row space, so the
    direction gives bᵢA back: r(2d − r) + d. For r = d every W' is reached: d²."""
    r = min(knobs.r, d)
    return Closed(d * d, min(d * d, r * (2 * d - r) + d), d)


def _nora(d: int, knobs: Any) -> Closed:
    """ΔW = U·X·Vᵀ with X = B'A' − B'₀A'₀ of size r_outer×r_outer: X runs over M_{r_inner}, shifted. Differences of its
    members hold all rank-one matrices, so the span is r_outer², and the tangent space that of M_{r_inner} in r_outer
    dimensions. One update has rank r_inner, twice that with the start taken off."""
    from lab.methods.nora import Nora

    layer = Layer("layer", d, d)
    r = Nora().outer_rank(layer, knobs)
    return Closed(r * r, knobs.r_inner * (2 * r - knobs.r_inner), Nora().rank(layer, knobs))


def _lora_xs(d: int, knobs: Any) -> Closed:
    """Linear in the r×r matrix R, injective: r² in both."""
    r = min(knobs.r, d)
    return Closed(r * r, r * r, r)


def _tinylora(d: int, knobs: Any) -> Closed:
    """Linear in v; the u matrices Pᵢ are independent up to r²."""
    u = min(knobs.u, min(knobs.r, d) ** 2)
    return Closed(u, u, min(knobs.r, d))


def _nola(d: int, knobs: Any) -> Closed:
    """ΔW = B(β)·A(α), bilinear: the span is that of the k·l products B_jA_i, independent up to d²; no more than r·d of
    the B_j, or of the A_i, are. For the Jacobian, δB·A + B·δA = 0 only if δB = BG, δA = −GA for some r×r matrix G: with
    generic bases the r² unknowns of G meet (rd − k) + (rd − l) conditions, and G = c·I always solves them (β → cβ,
    α → α/c). So the kernel has max(1, k + l − r(2d − r)) dimensions and the local dimension is
    min(k + l − 1, r(2d − r)). (The scale c/r changes nothing.)"""
    return _nola_of(d, knobs, started=False)


def _nola_started(d: int, knobs: Any) -> Closed:
    """The same with a frozen A₀ beside the A_i: l·(k + 1) products, and no scaling that cancels unless A₀ is itself a
    combination of the A_i (k ≥ r·d): min(k + l, r(2d − r))."""
    return _nola_of(d, knobs, started=True)


def _nola_of(d: int, knobs: Any, *, started: bool) -> Closed:
    r = min(knobs.r, d)
    k, l = min(knobs.k, r * d), min(knobs.l, r * d)
    more = 1 if started and knobs.k < r * d else 0
    span = min((k + more) * l, d * d)
    return Closed(span, min(k + l - 1 + more, r * (2 * d - r), span), r)


def _pranc(d: int, knobs: Any) -> Closed:
    """Linear in α over k independent matrices, up to d²."""
    k = min(knobs.k, d * d)
    return Closed(k, k, d)


def _vera(d: int, knobs: Any) -> Closed:
    """Row i of ΔW is bᵢ·(B_i∘d)·A: for d free, any vector of A's row space, in each row on its own through bᵢ: the span is
    d·min(r, d). b → cb, d → d/c cancels and nothing else does: d + r − 1 local dimensions."""
    span = d * min(knobs.r, d)
    return Closed(span, min(d + knobs.r - 1, span), min(knobs.r, d))


def _loha(d: int, knobs: Any) -> Closed:
    """An entrywise product of two members of M_r. Rank one times rank one is rank one: everything is spanned. Taking
    D₁X₁D₂ and D₁⁻¹X₂D₂⁻¹ for diagonal D₁, D₂ gives the same product: 2d − 1 dimensions of cancelling (Hadamard products
    of varieties, Friedenberg et al. 2017), so min(2r(2d − r) − (2d − 1), d²)."""
    r = min(knobs.r, d)
    return Closed(d * d, min(2 * r * (2 * d - r) - (2 * d - 1), d * d), min(r * r, d))


def _lokr(d: int, knobs: Any) -> Closed:
    """C ⊗ D: products of matrix units are matrix units of the whole, so everything is spanned, with D of rank one too.
    C → cC, D → D/c cancels: the dimensions of C's and of D's variety, less one. Ranks multiply."""
    row = Lokr()
    layer = Layer("layer", d, d)
    m1, m2, n1, n2, _, full = row.shapes(layer, knobs)
    r = min(m2, n2) if full else min(knobs.r, m2, n2)
    return Closed(d * d, m1 * n1 + r * (m2 + n2 - r) - 1, row.rank(layer, knobs))


def _krona(d: int, knobs: Any) -> Closed:
    """A ⊗ B, both full."""
    from lab.methods.builtin_factors import DiffuseKrona

    m1, m2, n1, n2, _, _ = DiffuseKrona().shapes(Layer("layer", d, d), knobs)
    return Closed(d * d, m1 * n1 + m2 * n2 - 1, min(m1, n1) * min(m2, n2))


def _hira(d: int, knobs: Any) -> Closed:
    """W∘X with X in M_r and no zero in W: an invertible linear image of M_r. Its members have full rank:
    diag(b)·W·diag(a) already has."""
    r = min(knobs.r, d)
    return Closed(d * d, r * (2 * d - r), d)


def _gralora(d: int, knobs: Any) -> Closed:
    """k² blocks of side d/k, each in its own M_{r/k}: k²·(r/k)(2d/k − r/k) = r(2d − r), as many as LoRA of rank r; but
    one update has rank k·r."""
    s, side = min(knobs.r // knobs.blocks, d // knobs.blocks), d // knobs.blocks
    return Closed(d * d, knobs.blocks**2 * s * (2 * side - s), min(knobs.blocks**2 * s, d))


def _miss(d: int, knobs: Any) -> Closed:
    """D·[I … I]: linear and injective."""
    r = min(knobs.r, d)
    return Closed(d * r, d * r, r)


def _ia3(d: int, knobs: Any) -> Closed:
    """One number a row of W."""
    return Closed(d, d, d)


def _started(d: int, knobs: Any) -> Closed:
    """LoRA whose start B₀·A₀ is taken off: M_r shifted by a member of it, so one update has twice the rank."""
    found = low_rank(d, knobs.r)
    return Closed(found.span, found.local, min(2 * knobs.r, d))


def _hydra(d: int, knobs: Any) -> Closed:
    """Two branches of rank r each: M_2r."""
    return low_rank(d, 2 * knobs.r)


def _adalora(d: int, knobs: Any) -> Closed:
    """P·diag(λ)·Q reaches what P·Q reaches."""
    return low_rank(d, knobs.init_r)


def _psoft(d: int, knobs: Any) -> Closed:
    """diag(α)·R·diag(β) with R a rotation of r dimensions: r(r − 1)/2 + 2r numbers of which one, α → cα, β → β/c,
    cancels; never more than the r² of the subspace, all of which they span."""
    r = min(knobs.r, d)
    return Closed(r * r, min(r * (r - 1) // 2 + 2 * r - 1, r * r), r)


def _randlora(d: int, knobs: Any) -> Closed:
    """N = ⌈d/r⌉ terms B_j·diag(λ_j)·A·diag(γ_j): a VeRA each, whose spans of d·r dimensions fill the whole together."""
    r = min(knobs.r, d)
    return Closed(d * d, min(-(-d // r) * (r + d - 1), d * d), d)


def _square(d: int, knobs: Any) -> Closed:
    """LoRA-SB: LoRA-XS on another basis."""
    return _lora_xs(d, knobs)


def _bone(d: int, knobs: Any) -> Closed:
    """One b×b block for each row of blocks, W_ij·D_i + D_i: linear and injective."""
    return Closed(d * knobs.block, d * knobs.block, d)


def _bitfit(d: int, knobs: Any) -> Closed:
    """The weight stays as it is."""
    return Closed(0, 0, 0)


FORMS: Mapping[str, Callable[[int, Any], Closed]] = {
    "lora": _lora,
    "rslora": _lora,
    "lora-plus": _lora,
    "lora-pro": _lora,
    "lora-riemannian": _lora,
    "structuredlora": _lora,  # B·N·A reaches what B·A reaches
    "lora-orthogonal": _lora,
    "eva": _lora,
    "allora": _lora,
    "dylora": _lora,
    "dv-lora": _lora,  # the vectors are scales of rows that are free anyway
    "sora": _lora,
    "hydra": _hydra,
    "block-lora": _block_lora,
    "adalora": _adalora,
    "pissa": _started,
    "olora": _started,
    "lora-ga": _started,
    "nlora": _started,
    "lora-fa": _frozen_a,
    # Any B·A has factors whose r products of lengths ‖b_i‖‖a_i‖ are equal: with ΔW = U·S·Vᵀ, B = U·S^½·Q and A = Qᵀ·S^½·Vᵀ
    # have qᵢᵀ·S·qᵢ, and some rotation Q makes that diagonal constant (Schur–Horn). DeLoRA's one length is as good as r.
    "delora": _lora,
    "lora-sb": _square,
    "psoft": _psoft,
    "randlora": _randlora,
    "bone": _bone,
    "road": _ia3,  # a scaled rotation of each pair of rows: two numbers, linear in them
    "bitfit": _bitfit,
    "ffa-lora": _frozen_a,
    "dora": _dora,
    "nora": _nora,
    "nola": _nola,
    "pranc": _pranc,
    "lora-xs": _lora_xs,
    "tinylora": _tinylora,
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "diffusekrona": _krona,
    "hira": _hira,
    "gralora": _gralora,
    "miss": _miss,
    "ia3": _ia3,
}


def closed_form(method: str, d: int, knobs: Any, *, start: bool = False) -> Closed | None:
    """The closed form of a method (a registry id) with these settings on a d×d layer, or None where there is none.

    `start` is for NOLA alone: with the frozen A₀ of the authors' code instead of the paper's equation.
    """
    if method == "nola" and start:
        return _nola_started(d, knobs)
    found = FORMS.get(method)
    return found(d, knobs) if found else None


def image_rank(method: str, knobs: Any) -> int | None:
    """ρ of the methods that reach all of M_ρ, plus a fixed matrix: B·A of free factors, or what comes to the same. None for
    all others."""
    found = _IMAGES.get(_lora if method in _FREE else FORMS.get(method))
    return found(knobs) if found else None


_IMAGES: Mapping[Callable[[int, Any], Closed] | None, Callable[[Any], int]] = {
    _lora: lambda knobs: knobs.r,
    _started: lambda knobs: knobs.r,  # the start that is taken off is the fixed matrix
    _hydra: lambda knobs: 2 * knobs.r,
    _adalora: lambda knobs: knobs.init_r,
    _block_lora: lambda knobs: knobs.r // knobs.blocks,
}

# No row of FORMS: its code computes in single precision, where ranks are not clear.
_FREE = ("deft",)  # P·(R − relu(P)ᵀ·W) with R free
