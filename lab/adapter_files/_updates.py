"""One layer's tensors → its update, for LoRA, LoHa, LoKr, DoRA and full differences. Nothing is read before it is asked.

Conventions, where programs differ (checked against LyCORIS, ComfyUI and PEFT 0.21):
- the scale is alpha / rank; without an alpha it is 1;
- LyCORIS' LoKr with both factors whole has the scale 1, whatever alpha says; PEFT's has alpha / rank always;
- a `dora_scale` of shape (1, in, …) scales the columns of W + ΔV (LyCORIS' default), one of shape (out, 1, …) the rows
  (LyCORIS with `wd_on_out`); PEFT's `lora_magnitude_vector` scales the rows, whatever its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.adapter_files._header import TensorFile, short, times
from lab.errors import LabError
from lab.methods.deltas import Delta, Pair

if TYPE_CHECKING:
    import torch

MAX_ENTRIES = 1 << 28  # of one layer's ΔW; the largest layer of LLaMA-2 70B has 2.3e8

KINDS = {"down": "lora", "hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "diff": "full"}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Update(Delta):
    """A `Delta` that tells its size before it is computed.

    shape: of W, (m, n) or (out, in, kh, kw); for a convolution whose kernel the file does not tell, (out, in·kh·kw)
    rank: what the file's factors bound it by, at most min(m, n)
    kind: lora, loha, lokr, full, or another method's id; `dora` with it where a magnitude is trained
    """

    shape: Shape = ()
    rank: int = 0
    kind: str = ""
    dora: bool = False


def scale_of(alpha: float | None, rank: int, rs: bool = False) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA; 1 without an alpha."""
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if rs else rank)


class Layer:
    """The tensors of one layer: part → key in the file."""

    def __init__(self, file: TensorFile, name: str, keys: dict[str, str]) -> None:
        self.file, self.name, self.keys = file, name, keys
        self.kind = next((KINDS[part] for part in keys if part in KINDS), "")

    def shape(self, part: str) -> Shape:
        return self.file.entries[self.keys[part]].shape

    def get(self, part: str) -> torch.Tensor:
        return self.file.tensor(self.keys[part])

    def wrong(self, what: str) -> LabError:
        return LabError(f"{self.file.called} has tensors of wrong shape in layer {short(self.name)}: {what}.")

    def need(self, *parts: str) -> None:
        for part in parts:
            if part not in self.keys:
                others = ", ".join(sorted(self.keys))
                raise LabError(f"{self.file.called} is not whole: layer {short(self.name)} has {others} but no {part}.")

    def alpha(self) -> float | None:
        """The layer's own alpha, None where there is none. LyCORIS reads 0 as "the rank"."""
        if "alpha" not in self.keys:
            return None
        if self.file.entries[self.keys["alpha"]].numel != 1:
            raise self.wrong(f"alpha is {times(list(self.shape('alpha')))}, not one number")
        return float(self.get("alpha").reshape(())) or None


def update(layer: Layer, alpha: float | None, rank: int | None = None, rs: bool = False) -> Update:
    """The update without a magnitude. Raises LabError on shapes that do not belong together.

    alpha: the scale's numerator, None where the file has none; rank: a PEFT configuration's, else the tensors' own
    """
    make = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}.get(layer.kind)
    if make is None:
        raise LabError(
            f"{layer.file.called} is not whole: layer {short(layer.name)} has {', '.join(sorted(layer.keys))} alone."
        )
    found = make(layer, alpha, rank, rs)
    if not all(found.shape) or math.prod(found.shape) > MAX_ENTRIES:
        raise layer.wrong(f"its update would be {times(list(found.shape))}, a size that no layer has")
    return found


Make = Callable[[], "torch.Tensor"]


def _product(left: Make, right: Make, shape: Shape, rank: int, kind: str) -> Update:
    """The update left · right, both given as matrices."""

    def factors() -> Pair:
        return left(), right()

    def dense() -> torch.Tensor:
        return (left() @ right()).reshape(shape)

    return Update(dense, factors, shape, rank, kind)


def _full(layer: Layer, alpha: float | None, given: int | None, rs: bool) -> Update:
    shape = layer.shape("diff")
    if len(shape) < 2:
        raise layer.wrong(f"its difference is {times(list(shape))}, no matrix")
    return Update(lambda: layer.get("diff"), lambda: None, shape, _least(shape), "full")


def _lora(layer: Layer, alpha: float | None, given: int | None, rs: bool) -> Update:
    layer.need("down", "up")
    down, up = layer.shape("down"), layer.shape("up")
    if len(down) not in (2, 3, 4) or len(up) not in (2, 3, 4) or math.prod(up[2:]) != 1:
        raise layer.wrong(f"down is {times(list(down))} and up is {times(list(up))}")
    r = up[1]
    inner = layer.shape("mid") if "mid" in layer.keys else None
    if inner is None and down[0] != r:
        raise layer.wrong(f"down has rank {down[0]}, up has rank {r}")
    if inner is not None and (len(inner) < 3 or inner[:2] != (r, down[0]) or math.prod(down[2:]) != 1):
        raise layer.wrong(f"down, mid and up are {times(list(down))}, {times(list(inner))} and {times(list(up))}")
    kernel = inner[2:] if inner is not None else down[2:]
    shape = (up[0], down[1], *(kernel if math.prod(kernel) > 1 or len(down) > 2 else ()))
    scale = scale_of(alpha, given or r, rs)

    def right() -> torch.Tensor:
        A = layer.get("down").flatten(1)
        if inner is None:
            return A
        import torch

        return torch.einsum("rq...,qn->rn...", layer.get("mid"), A).flatten(1)

    def left() -> torch.Tensor:
        return layer.get("up").flatten(1) * scale

    return _product(left, right, shape, min(r, _least(shape)), "lora")


def _loha(layer: Layer, alpha: float | None, given: int | None, rs: bool) -> Update:
    """(a₁·b₁) ∘ (a₂·b₂): a product of Khatri–Rao products of rank r²; with cores t, a Tucker form of each factor."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    layer.need(*names)
    a1, b1, a2, b2 = (layer.shape(n) for n in names)
    cores = [layer.shape(n) for n in ("hada_t1", "hada_t2") if n in layer.keys]
    r = b1[0] if b1 else 0
    if any(len(s) != 2 for s in (a1, b1, a2, b2)) or len(cores) == 1:
        raise layer.wrong(", ".join(f"{n} is {times(list(layer.shape(n)))}" for n in names))
    if cores:
        fits = all(len(c) == 4 and c[:2] == (a1[0], b1[0]) for c in cores) and cores[0] == cores[1]
        fits = fits and a1 == a2 and b1 == b2
        shape: Shape = (a1[1], b1[1], *cores[0][2:])
    else:
        fits = a1[1] == b1[0] and a2[1] == b2[0] and a1[0] == a2[0] and b1[1] == b2[1]
        shape = (a1[0], b1[1])
    if not fits:
        raise layer.wrong(", ".join(f"{n} is {times(list(layer.shape(n)))}" for n in names))
    scale, bound = scale_of(alpha, given or r, rs), (_least(shape) if cores else min(a1[1] * a2[1], _least(shape)))

    def dense() -> torch.Tensor:
        A1, B1, A2, B2 = (layer.get(n) for n in names)
        if not cores:
            return (A1 @ B1) * (A2 @ B2) * scale
        first, second = _tucker(layer.get("hada_t1"), A1, B1), _tucker(layer.get("hada_t2"), A2, B2)
        return first * second * scale

    def factors() -> Pair | None:
        if cores or bound == _least(shape):
            return None
        A1, B1, A2, B2 = (layer.get(n) for n in names)
        left = (A1[:, :, None] * A2[:, None, :]).flatten(1) * scale
        return left, (B1[:, None, :] * B2[None, :, :]).flatten(0, 1)

    return Update(dense, factors, shape, bound, "loha")


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """core (p, q, kh, kw), a (p, out), b (q, in) → (out, in, kh, kw)."""
    import torch

    return torch.einsum("pqkl,po,qi->oikl", core, a, b)


def _lokr(layer: Layer, alpha: float | None, given: int | None, rs: bool) -> Update:
    """w₁ ⊗ w₂, either of them a product; with a core t₂, w₂ is a Tucker form."""
    one, two = ("lokr_w1_a" in layer.keys), ("lokr_w2_a" in layer.keys)
    layer.need(*(("lokr_w1_a", "lokr_w1_b") if one else ("lokr_w1",)))
    layer.need(*(("lokr_w2_a", "lokr_w2_b") if two else ("lokr_w2",)))
    core = layer.shape("lokr_t2") if "lokr_t2" in layer.keys else None
    s1, r1 = _kron_part(layer, "lokr_w1", one, None)
    s2, r2 = _kron_part(layer, "lokr_w2", two, core)
    shape: Shape = (s1[0] * s2[0], s1[1] * s2[1], *s2[2:])
    whole = not one and not two
    r = (layer.shape("lokr_w2_b") if two else layer.shape("lokr_w1_b"))[0] if not whole else _least(shape)
    scale = 1.0 if whole and given is None else scale_of(alpha, given or r, rs)
    bound = min(r1 * r2, _least(shape))

    def first() -> torch.Tensor:
        return layer.get("lokr_w1_a") @ layer.get("lokr_w1_b") if one else layer.get("lokr_w1")

    def second() -> torch.Tensor:
        if core is not None:
            return _tucker(layer.get("lokr_t2"), layer.get("lokr_w2_a"), layer.get("lokr_w2_b"))
        return layer.get("lokr_w2_a") @ layer.get("lokr_w2_b") if two else layer.get("lokr_w2")

    def dense() -> torch.Tensor:
        import torch

        w1, w2 = first(), second()
        return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous()).reshape(shape) * scale

    def factors() -> Pair | None:
        if not two or core is not None or bound == _least(shape):
            return None
        import torch

        a, b = (layer.get("lokr_w1_a"), layer.get("lokr_w1_b")) if one else _split(first())
        return torch.kron(a, layer.get("lokr_w2_a")) * scale, torch.kron(b, layer.get("lokr_w2_b"))

    return Update(dense, factors, shape, bound, "lokr")


def _split(w: torch.Tensor) -> Pair:
    """A small matrix as a product whose inner side is its shorter one."""
    import torch

    eye = torch.eye(min(w.shape))
    return (w, eye) if w.shape[1] <= w.shape[0] else (eye, w)


def _kron_part(layer: Layer, name: str, product: bool, core: Shape | None) -> tuple[Shape, int]:
    """Shape of one side of a Kronecker product, and a bound on its rank."""
    if not product:
        shape = layer.shape(name)
        if len(shape) not in (2, 4):
            raise layer.wrong(f"{name} is {times(list(shape))}")
        return shape, _least(shape)
    a, b = layer.shape(f"{name}_a"), layer.shape(f"{name}_b")
    told = f"{name}_a is {times(list(a))}, {name}_b is {times(list(b))}"
    if len(a) != 2 or len(b) != 2:
        raise layer.wrong(told)
    if core is None:
        if a[1] != b[0]:
            raise layer.wrong(told)
        return (a[0], b[1]), min(a[0], a[1], b[1])
    if len(core) != 4 or core[:2] != (a[0], b[0]):
        raise layer.wrong(f"{told}, lokr_t2 is {times(list(core))}")
    return (a[1], b[1], *core[2:]), _least((a[1], b[1], *core[2:]))


def _least(shape: Shape) -> int:
    return min(shape[0], math.prod(shape[1:]))


def decomposed(layer: Layer, inner: Update, weight: Callable[[], torch.Tensor]) -> Update:
    """DoRA (Liu et al. 2024, eq. 5): magnitude · (W + ΔV) / ‖W + ΔV‖ − W, from ΔV and the base's weight."""
    part = "magnitude" if "magnitude" in layer.keys else "dora_scale"
    shape, given = inner.shape, layer.shape(part)
    columns = part == "dora_scale" and len(given) > 1 and given[0] == 1 and shape[0] != 1
    if math.prod(given) != shape[1 if columns else 0]:
        raise layer.wrong(f"the magnitude is {times(list(given))}, the layer {times(list(shape))}")

    def dense() -> torch.Tensor:
        W, V = weight(), inner.dense()
        moved = W + V.reshape(W.shape)
        magnitude = layer.get(part).reshape(-1)
        if columns:  # over the inputs' own entries: all but dimension 1
            norm = moved.transpose(0, 1).flatten(1).norm(dim=1)
            scale = (magnitude / norm.clamp_min(1e-12)).reshape(1, -1, *[1] * (W.dim() - 2))
        else:
            norm = moved.flatten(1).norm(dim=1)
            scale = (magnitude / norm.clamp_min(1e-12)).reshape(-1, *[1] * (W.dim() - 1))
        return moved * scale - W

    return Update(dense, lambda: None, shape, _least(shape), inner.kind, dora=True)
