"""ΔW as a function of the trained numbers, in double precision and many at a time: the equations of the methods.

Imports no torch. Frozen tensors are drawn from the seed; trained ones are given as one row of θ for each update.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.coverage.bilinear import Bilinear
from lab.coverage.pairs import NolaPair, RowsPair, VeraPair
from lab.methods.builtin_factors import DiffuseKrona, Lokr
from lab.methods.spec import Layer

Array = np.ndarray
Formula = Callable[[dict[str, Array]], Array]


@dataclass(frozen=True)
class UpdateMap:
    """θ (p,) → ΔW (d, d) of one layer. `formula` takes the trained tensors by name, each with a leading axis of
    updates, and gives (N, d, d); it must be analytic in them (no absolute values, no conjugates), so that the complex
    step can differentiate it. `linear` says that ΔW is linear in θ but for a fixed ΔW(0); `nearest`, where such a map has
    one, gives the update (d, d) nearest to a target. `pair`, where there is one, reaches the
    same ΔW (their closure), linear in each of two groups of numbers."""

    d: int
    shapes: dict[str, tuple[int, ...]]
    formula: Formula
    linear: bool = False
    pair: Bilinear | None = None
    nearest: Callable[[Array], Array] | None = None
    basis: Array | None = None  # (p, d²), where a linear map keeps it as it is

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def delta(self, theta: Array) -> Array:
        """Updates (N, d²) of the rows of θ (N, p)."""
        t, at = {}, 0
        for name, shape in self.shapes.items():
            width = math.prod(shape)
            t[name] = theta[:, at : at + width].reshape(-1, *shape)
            at += width
        return self.formula(t).reshape(len(theta), self.d * self.d)

    def jacobian(self, theta: Array) -> Array:
        """∂ΔW/∂θ (p, d²) at θ (p,), by the complex step Im ΔW(θ + i·h·eⱼ)/h: exact to rounding, no cancellation."""
        p = self.size
        if self.linear:
            return self.delta(np.eye(p)) if self.basis is None else self.basis
        out = np.empty((p, self.d * self.d))
        step, rows = 1e-30, max(1, (1 << 20) // (self.d * self.d))
        for first in range(0, p, rows):
            block = np.tile(theta.astype(complex), (min(rows, p - first), 1))
            block[np.arange(len(block)), first + np.arange(len(block))] += 1j * step
            out[first : first + len(block)] = self.delta(block).imag / step
        return out

    def draw(self, rng: np.random.Generator, count: int) -> Array:
        """`count` random θ (N, p)."""
        return self.about(rng.standard_normal((count, self.size)))

    def about(self, noise: Array) -> Array:
        """θ of standard normal numbers; of smaller ones, nearer to where the method starts."""
        return noise


def generator(seed: int, *what: object) -> np.random.Generator:
    """A Philox generator that depends on the seed and on what it is for, and on nothing else."""
    return np.random.Generator(np.random.Philox([seed, *(zlib.crc32(str(w).encode()) for w in what)]))


_given: ContextVar[Array | None] = ContextVar("base weight", default=None)


@contextlib.contextmanager
def on_weight(W: Array | None) -> Generator[None]:
    """Maps made meanwhile have the first d rows and columns of W as their base weight, in place of a random one."""
    token = _given.set(W)
    try:
        yield
    finally:
        _given.reset(token)


def weight(d: int, seed: int) -> Array:
    """The base weight W (d, d) of every map of this d and seed: normal, of spectral norm about 2; or the given one."""
    if (given := _given.get()) is not None:
        return np.ascontiguousarray(given[:d, :d], dtype=np.float64)
    return generator(seed, "weight", d).standard_normal((d, d)) / math.sqrt(d)


# -- the equations ---------------------------------------------------------------------------------------------
def lora(d: int, knobs: Any, seed: int) -> UpdateMap:
    """B·A; the scale changes no subspace."""
    return UpdateMap(d, {"B": (d, knobs.r), "A": (knobs.r, d)}, lambda t: t["B"] @ t["A"])


def frozen_a(d: int, knobs: Any, seed: int) -> UpdateMap:
    """FFA-LoRA: B·A with A frozen at random."""
    A = generator(seed, "ffa", d).standard_normal((knobs.r, d))
    return UpdateMap(d, {"B": (d, knobs.r)}, lambda t: t["B"] @ A, linear=True, nearest=_rows_in(A))


def _rows_in(A: Array) -> Callable[[Array], Array]:
    """T → T·A⁺A: B·A with B free is whatever has its rows in A's row space (A (r, d) of rank min(r, d))."""
    Q = np.linalg.qr(A.T)[0]
    return lambda goal: (goal @ Q) @ Q.T


def dora(d: int, knobs: Any, seed: int) -> UpdateMap:
    """diag(g)·(W + BA)/‖W + BA‖_row − W, the norm included in the derivative (PEFT detaches it for the gradient,
    which changes how it is trained, not what can be reached)."""
    W = weight(d, seed)

    def formula(t: dict[str, Array]) -> Array:
        V = W + t["B"] @ t["A"]
        return t["g"][:, :, None] * V / np.sqrt((V * V).sum(2, keepdims=True)) - W

    pair = RowsPair(knobs.r, np.ones((d, d)), W)
    return UpdateMap(d, {"B": (d, knobs.r), "A": (knobs.r, d), "g": (d,)}, formula, pair=pair)


def nora(d: int, knobs: Any, seed: int) -> UpdateMap:
    """U_r·(B'A' − B'₀A'₀)·V_rᵀ over singular vectors of W (any two orthonormal frames give the same dimensions)."""
    from lab.methods.nora import Nora

    r, i = Nora().outer_rank(Layer("layer", d, d), knobs), knobs.r_inner
    U, S, Vt = np.linalg.svd(weight(d, seed))
    root = np.diag(np.sqrt(S[:r]))
    C = root[:, :i] @ root[:i] if knobs.identity_init else 0.0
    shapes = {"inner_b": (r, i), "inner_a": (i, r)}
    return UpdateMap(d, shapes, lambda t: U[:, :r] @ (t["inner_b"] @ t["inner_a"] - C) @ Vt[:r])


def lora_xs(d: int, knobs: Any, seed: int) -> UpdateMap:
    """(U_r Σ_r)·R·V_rᵀ."""
    U, S, Vt = np.linalg.svd(weight(d, seed))
    B, A = U[:, : knobs.r] * S[: knobs.r], Vt[: knobs.r]
    left = U[:, : knobs.r]  # B·R·A with R free is whatever stays as it is between the two projections
    shapes = {"R": (knobs.r, knobs.r)}
    return UpdateMap(
        d, shapes, lambda t: B @ t["R"] @ A, linear=True, nearest=lambda goal: left @ (left.T @ goal @ A.T) @ A
    )


def tinylora(d: int, knobs: Any, seed: int) -> UpdateMap:
    """U_rΣ_r·(Σᵢ vᵢPᵢ)·V_rᵀ over u random r×r matrices Pᵢ."""
    U, S, Vt = np.linalg.svd(weight(d, seed))
    r = knobs.r
    P = generator(seed, "tinylora", d, r).standard_normal((knobs.u, r * r))
    B, A = U[:, :r] * S[:r], Vt[:r]
    return UpdateMap(d, {"v": (knobs.u,)}, lambda t: B @ (t["v"] @ P).reshape(-1, r, r) @ A, linear=True)


def nola(d: int, knobs: Any, seed: int, bases: tuple[Array, Array, Array] | None = None) -> UpdateMap:
    """(Σⱼ βⱼBⱼ)·(A₀ + Σᵢ αᵢAᵢ). `bases` = (A (k, r·d), B (l, d·r), A₀ (r·d)); A₀ = 0 is the paper's equation, and
    what its Figure 2 samples (`start` in lab.coverage.curves adds the authors' frozen A₀)."""
    r = knobs.r
    if bases is None:
        bases = (
            vectors(knobs.basis, knobs.k, r * d, generator(seed, "nola a", d, r)),
            vectors(knobs.basis, knobs.l, r * d, generator(seed, "nola b", d, r)),
            np.zeros(r * d),
        )
    A, B, A0 = bases
    shapes = {"alpha": (knobs.k,), "beta": (knobs.l,)}
    pair = NolaPair(A.reshape(-1, r, d), B.reshape(-1, d, r), A0.reshape(r, d))

    def formula(t: dict[str, Array]) -> Array:
        return (t["beta"] @ B).reshape(-1, d, r) @ (t["alpha"] @ A + A0).reshape(-1, r, d)

    return UpdateMap(d, shapes, formula, pair=pair)


def nola_started(d: int, knobs: Any, seed: int) -> UpdateMap:
    """NOLA as it is trained: with A₀, entries uniform of variance 1/(3d)."""
    r = knobs.r
    A = vectors(knobs.basis, knobs.k, r * d, generator(seed, "nola a", d, r))
    B = vectors(knobs.basis, knobs.l, r * d, generator(seed, "nola b", d, r))
    return nola(d, knobs, seed, (A, B, generator(seed, "nola a0", d, r).uniform(-1, 1, r * d) / math.sqrt(d)))


def pranc(d: int, knobs: Any, seed: int) -> UpdateMap:
    """Σ αᵢvᵢ."""
    kind = "uniform" if knobs.basis == "auto" else knobs.basis
    v = vectors(kind, knobs.k, d * d, generator(seed, "pranc", d))
    return UpdateMap(d, {"alpha": (knobs.k,)}, lambda t: (t["alpha"] @ v).reshape(-1, d, d), linear=True, basis=v)


def vectors(basis: str, k: int, size: int, rng: np.random.Generator) -> Array:
    """k basis vectors (k, size) of entries of variance 1/(3k): uniform, or random rows of a Walsh–Hadamard matrix with
    random signs of its columns, chosen as lab/methods/_basis.py chooses them (different in their lowest bits)."""
    if basis != "hadamard":
        return rng.uniform(-1, 1, (k, size)) / math.sqrt(k)
    side, low = 1 << max(size - 1, 0).bit_length(), 1 << max(k - 1, 0).bit_length()
    rows = np.arange(k) + low * rng.integers(0, side // low, k)
    both = rows[:, None] & np.arange(size)[None]
    parity = np.bitwise_count(both) & 1
    return (1.0 - 2.0 * parity) * rng.choice((-1.0, 1.0), size) / math.sqrt(3 * k)


def vera(d: int, knobs: Any, seed: int) -> UpdateMap:
    """diag(b)·B·diag(d)·A."""
    rng = generator(seed, "vera", d)
    B, A = rng.standard_normal((d, knobs.r)), rng.standard_normal((knobs.r, d))
    shapes: dict[str, tuple[int, ...]] = {"b": (d,), "d": (knobs.r,)}
    pair = VeraPair(B, A)
    if knobs.r * d * d <= 1 << 21:  # one large product, over the r outer products of B's columns and A's rows
        products = np.einsum("mj,jn->jmn", B, A).reshape(knobs.r, d * d)
        return UpdateMap(d, shapes, lambda t: t["b"][:, :, None] * (t["d"] @ products).reshape(-1, d, d), pair=pair)
    return UpdateMap(d, shapes, lambda t: t["b"][:, :, None] * ((B * t["d"][:, None, :]) @ A), pair=pair)


def loha(d: int, knobs: Any, seed: int) -> UpdateMap:
    """(B₁A₁)∘(B₂A₂)."""
    shapes = {"B1": (d, knobs.r), "A1": (knobs.r, d), "B2": (d, knobs.r), "A2": (knobs.r, d)}
    return UpdateMap(d, shapes, lambda t: (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"]))


def lokr(row: Lokr) -> Callable[[int, Any, int], UpdateMap]:
    """C ⊗ (D_b·D_a), or C ⊗ D where PEFT makes the larger factor full."""

    def made(d: int, knobs: Any, seed: int) -> UpdateMap:
        m1, m2, n1, n2, _, full = row.shapes(Layer("layer", d, d), knobs)
        r = 0 if full else knobs.r
        shapes: dict[str, tuple[int, ...]] = {"C": (m1, n1)} | (
            {"D": (m2, n2)} if full else {"Db": (m2, r), "Da": (r, n2)}
        )

        def formula(t: dict[str, Array]) -> Array:
            D = t["D"] if full else t["Db"] @ t["Da"]
            return np.einsum("xab,xcd->xacbd", t["C"], D).reshape(-1, d, d)

        return UpdateMap(d, shapes, formula)

    return made


def hira(d: int, knobs: Any, seed: int) -> UpdateMap:
    """W∘(BA)."""
    W = weight(d, seed)
    shapes = {"B": (d, knobs.r), "A": (knobs.r, d)}
    return UpdateMap(d, shapes, lambda t: W * (t["B"] @ t["A"]), pair=RowsPair(knobs.r, W))


def gralora(d: int, knobs: Any, seed: int) -> UpdateMap:
    """k×k blocks, each B_ij·A_ij of rank r/k."""
    k, s = knobs.blocks, knobs.r // knobs.blocks
    side = d // k

    def formula(t: dict[str, Array]) -> Array:
        return (t["B"] @ t["A"]).transpose(0, 1, 3, 2, 4).reshape(-1, d, d)

    return UpdateMap(d, {"B": (k, k, side, s), "A": (k, k, s, side)}, formula)


def miss(d: int, knobs: Any, seed: int) -> UpdateMap:
    """D·[I I … I], the last block cut."""
    shared = (np.arange(d)[None] % knobs.r == np.arange(knobs.r)[:, None]).astype(float)
    return UpdateMap(d, {"D": (d, knobs.r)}, lambda t: t["D"] @ shared, linear=True, nearest=_rows_in(shared))


def ia3(d: int, knobs: Any, seed: int) -> UpdateMap:
    """diag(l)·W, l counted from 1."""
    W = weight(d, seed)
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    return UpdateMap(
        d, {"l": (d,)}, lambda t: t["l"][:, :, None] * W, linear=True,
        nearest=lambda goal: (goal * unit).sum(1, keepdims=True) * unit,
    )  # fmt: skip


def block_lora(d: int, knobs: Any, seed: int) -> UpdateMap:
    """(B_1 + … + B_N)·A_s."""
    each = knobs.r // knobs.blocks
    shapes = {"B": (knobs.blocks, d, each), "A": (each, d)}
    return UpdateMap(d, shapes, lambda t: t["B"].sum(1) @ t["A"])


def structured(d: int, knobs: Any, seed: int) -> UpdateMap:
    """B·N·A."""
    r = knobs.r
    return UpdateMap(d, {"B": (d, r), "N": (r, r), "A": (r, d)}, lambda t: t["B"] @ t["N"] @ t["A"])


Maker = Callable[[int, Any, int], UpdateMap]

MAPS: Mapping[str, Maker] = {
    "lora": lora,
    "rslora": lora,
    "lora-plus": lora,
    "lora-pro": lora,
    "ffa-lora": frozen_a,
    "dora": dora,
    "nora": nora,
    "nola": nola,
    "pranc": pranc,
    "lora-xs": lora_xs,
    "tinylora": tinylora,
    "vera": vera,
    "loha": loha,
    "lokr": lokr(Lokr()),
    "diffusekrona": lokr(DiffuseKrona()),
    "hira": hira,
    "gralora": gralora,
    "miss": miss,
    "ia3": ia3,
    "block-lora": block_lora,
    "structuredlora": structured,
}
