"""NoRA: nested low-rank adaptation (Lin et al. 2024, arXiv 2408.10280; ICCV 2025).

W ≈ U_r·Σ_r·V_rᵀ, r = r_outer. Outer factors B = U_r (m×r), A = V_rᵀ (r×n), frozen; inner factors B' (r×r_inner),
A' (r_inner×r), trained, started as the first r_inner columns and rows of Σ_r^½.  ΔW = s·B·B'·A'·A.

The paper's equation 2 and Algorithm 1 do not type-check (A and B swapped; `r_out // r_in` used as a slice). This form
is the one that agrees with its equation 4 (2·r_outer·r_inner trained numbers a layer), its Figure 1 and the authors'
code (github.com/lliai/LoRA-Zoo, commit 52dcec3, nora/loralib/lora_lib.py, `NoRALinear_C`: two frozen outer factors, two
trained inner ones, r_outer = 0.8 of the smaller side, r_inner = 16). The paper does not say that the start value is
taken off; here it is by default, so that training starts at the base model and W itself never changes.

The start is the paper's. In `NoRALinear_C` the outer factors hold Σ (all of it in one, or its root in each; of the
activation-scaled weight, the scale divided out again), the inner ones are drawn from N(0, 1), and s is alpha/r_outer; the
start value stays in, and the layer's bias is added a second time. nora/loralib/layers.py, an earlier form, starts the
inner factors (of r_outer/40 ranks) orthogonal, with a trained diagonal between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.own import Need, OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class NoraKnobs(Knobs):
    r_outer: int | float = knob(
        0.8, "Rank of the frozen outer factors; below 1, a fraction of the layer's smaller side.", low=0.001, size=True
    )
    r_inner: int = knob(4, "Rank of the trained inner factors: the update's rank.", low=1, size=True)
    scale: float = knob(1.0, "Factor s of the update.", low=1e-6)
    outer: str = knob(
        "svd", "Where the outer basis comes from.", choices=("svd", "activation", "gradient", "minor", "random")
    )
    identity_init: bool = knob(True, "Take the start value off, so that training starts at the base model.")
    save_outer: bool = knob(False, "Store the outer factors in the file instead of making them again from the base.")


class Nora(OwnMethod):
    """Nested low-rank adaptation: NoraConfig(r_outer, r_inner, scale, outer, identity_init, save_outer)."""

    id, name, order = "nora", "NoRA", 2
    learning_rate = 0.005
    paper = Paper("NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models", "2408.10280")
    kind = "weight update"
    summary = "A small LoRA trained inside a frozen one whose factors are the singular vectors of the weight."
    equation = (
        r"\Delta W = s\,\underbrace{U_r}_{\text{frozen}} (B'A' - B'_0A'_0)\,\underbrace{V_r^\top}_{\text{frozen}}"
    )
    knobs = NoraKnobs
    low_rank = True
    tensors = {
        "trained": {"B′": "r_outer × r_inner", "A′": "r_inner × r_outer"},
        "frozen": {"B": "m × r_outer", "A": "r_outer × n", "W": "m × n"},
    }
    product = ("B", "B′", "A′", "A")
    remark = (
        "The paper's equation 2 and Algorithm 1 do not type-check; this is the form of its equation 4 and of the"
        " authors' code. The start value is subtracted (identity_init), which the paper leaves open. The released code"
        " keeps Σ in the outer factors and draws the inner ones at random; here they start from Σ, as the paper says."
    )

    # -- counting ------------------------------------------------------------------------------------------
    def outer_rank(self, layer: Layer, knobs: NoraKnobs) -> int:
        """r_outer on this layer: as given, or the fraction of min(m, n), rounded down, at least r_inner if that fits."""
        if isinstance(knobs.r_outer, float) and knobs.r_outer < 1:
            return max(1, int(knobs.r_outer * min(layer.m, layer.n)))
        return int(knobs.r_outer)

    def check(self, layer: Layer, knobs: NoraKnobs) -> None:
        """Raises LabError, naming the layer, unless r_inner ≤ r_outer ≤ min(m, n)."""
        r, smaller = self.outer_rank(layer, knobs), min(layer.m, layer.n)
        if isinstance(knobs.r_outer, float) and knobs.r_outer > 1 and not knobs.r_outer.is_integer():
            raise LabError(f"r_outer must be a whole number or a fraction below 1, got {knobs.r_outer:g}.")
        if r > smaller:
            raise LabError(
                f"r_outer is {r}, but layer {layer.name} is {layer.m}×{layer.n}: take at most {smaller}, or a fraction."
            )
        if knobs.r_inner > r:
            raise LabError(f"r_inner is {knobs.r_inner}, more than r_outer {r} on layer {layer.name}: lower r_inner.")

    def count_layer(self, layer: Layer, knobs: NoraKnobs) -> int:
        return 2 * self.outer_rank(layer, knobs) * knobs.r_inner

    def rank(self, layer: Layer, knobs: NoraKnobs) -> int:
        return min(knobs.r_inner * (2 if knobs.identity_init else 1), self.outer_rank(layer, knobs))

    def need(self, knobs: NoraKnobs) -> Need:
        needs: dict[str, Need] = {"activation": "activations", "gradient": "gradient"}
        return needs.get(knobs.outer, "")

    def stores(self, knobs: NoraKnobs) -> bool:
        return knobs.save_outer or self.need(knobs) != ""

    def derived(self, knobs: NoraKnobs) -> tuple[str, ...]:
        return ("outer_b", "outer_a", *(("start_b",) if knobs.identity_init else ()))

    def shapes(self, layer: Layer, knobs: NoraKnobs) -> dict[str, tuple[int, ...]]:
        r, i = self.outer_rank(layer, knobs), knobs.r_inner
        outer: dict[str, tuple[int, ...]] = {"outer_b": (layer.m, r), "outer_a": (r, layer.n)}
        start: dict[str, tuple[int, ...]] = {
            "start_b": (r, i),
            "start_a": (i, r),
            "start_q": (layer.m, i),
            "start_p": (i, layer.n),
        }
        return outer | (start if knobs.identity_init else {})

    def trained_shapes(self, layer: Layer, knobs: NoraKnobs) -> dict[str, tuple[int, ...]]:
        r, i = self.outer_rank(layer, knobs), knobs.r_inner
        return {"inner_b": (r, i), "inner_a": (i, r)}

    # -- the update ------------------------------------------------------------------------------------------
    def init(self, start: Start, knobs: NoraKnobs) -> Tensors:
        B, S, A = self.outer_basis(start, knobs)
        root = S.sqrt().diag()
        b, a = root[:, : knobs.r_inner].contiguous(), root[: knobs.r_inner].contiguous()
        frozen = {"outer_b": B, "outer_a": A}
        if knobs.identity_init:
            frozen |= {"start_b": b, "start_a": a, "start_q": B @ b, "start_p": a @ A}
        return Tensors({"inner_b": b, "inner_a": a}, frozen)

    def prepare(self, starts: list[Start], knobs: NoraKnobs) -> None:
        """W's own basis of every layer, several layers at once; `activation` factorises something else."""
        from lab import svd

        if knobs.outer != "activation":
            ranks = [self.outer_rank(start.layer, knobs) for start in starts]
            found = svd.bases([start.weight for start in starts], ranks)
            for start, basis in zip(starts, found, strict=True):
                start.prepared = basis

    def outer_basis(self, start: Start, knobs: NoraKnobs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B (m, r), S (r,), A (r, n)). S starts the inner factors: the singular values of what was factorised;
        for `gradient`, `minor` and `random` W's own largest ones, so that the bases differ in nothing else."""
        from lab import svd

        r = self.outer_rank(start.layer, knobs)
        if knobs.outer == "activation":  # W·diag(a) = U·S·Vᵀ, so W = U·S·(Vᵀ·diag(a)⁻¹)
            assert start.activation is not None
            a = start.activation / start.activation.mean().clamp_min(1e-12)
            a = a.clamp_min(1e-3)  # a channel that the batch never used must not divide by nothing
            found = svd.basis(start.weight() * a, r, cache=False)
            return found.U, found.S, found.Vh / a
        found = start.prepared or svd.basis(start.weight(), r)
        if knobs.outer == "gradient":
            assert start.gradient is not None
            of_gradient = svd.basis(start.gradient, r, cache=False)
            return of_gradient.U, found.S, of_gradient.Vh
        if knobs.outer == "minor":
            last = svd.basis(start.weight(), r, smallest=True)
            return last.U, found.S, last.Vh
        if knobs.outer == "random":
            m, n = start.layer.m, start.layer.n
            return start.orthonormal(m, r), found.S, start.orthonormal(n, r).T.contiguous()
        return found

    def factors(self, t: Mapping[str, torch.Tensor], knobs: NoraKnobs, layer: Layer) -> Any:
        """The inner factors folded into the outer ones first, so that tokens see a LoRA of rank 2·r_inner.

        With D_B = B(B'−B'₀) and D_A = (A'−A'₀)A:  B·B'·A'·A − B·B'₀·A'₀·A = D_B·(P₀+D_A) + Q₀·D_A, where Q₀ = B·B'₀
        and P₀ = A'₀·A: exactly zero at the start, and without cancellation near it.
        """
        B, A, s = t["outer_b"], t["outer_a"], knobs.scale
        if not knobs.identity_init:
            return (B @ t["inner_b"]) * s, t["inner_a"] @ A
        right, rows = self.folded(t, t["inner_b"], t["inner_a"])
        return (rows.T * s if s != 1 else rows.T), right

    def folded(self, t: Mapping[str, torch.Tensor], b: torch.Tensor, a: torch.Tensor) -> tuple[Any, Any]:
        """([P₀ + D_A; D_A] (2i, n), [D_B, Q₀]ᵀ (2i, m))."""
        import torch

        d_b = (b - t["start_b"]).T.contiguous() @ t["outer_b"].T  # thin products are fastest with the thin side first
        d_a = (a - t["start_a"]) @ t["outer_a"]
        return torch.cat((t["start_p"] + d_a, d_a)), torch.cat((d_b, t["start_q"].T))

    def by_hand(self, t: Mapping[str, torch.Tensor], knobs: NoraKnobs, layer: Layer) -> Any:
        from lab.methods._fused import ByHand

        if not knobs.identity_init:
            return None
        B, A, s, i = t["outer_b"], t["outer_a"], knobs.scale, knobs.r_inner

        def forward(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            right, rows = self.folded(t, b, a)
            return right, (rows if s == 1 else rows * s)

        def backward(to_a: torch.Tensor, to_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            to_b = (to_rows[:i] @ B).T
            return (to_b if s == 1 else to_b * s), (to_a[:i] + to_a[i:]) @ A.T

        return ByHand((t["inner_b"], t["inner_a"]), forward, backward)


nora = register(Nora())
