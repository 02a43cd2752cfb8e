"""SALT: the top singular values scaled and shifted, the rest changed by a low-rank matrix (Elsayed et al. 2025, arXiv 2503.16055).

W = U·diag(σ)·Vᵀ, all p = min(m, n) terms. W' = U·relu(S')·Vᵀ where S' is diag(a·σ + b) on the first k and
diag(σ) + X·Y on the others; a, b (k), X (p−k, r), Y (r, p−k) are trained, from a = 1, b = 0, X, Y ~ 0.01·N(0, 1).
Official code: github.com/BioMedIA-MBZUAI/SALT (`SALTLinear`, read in a public copy: `trainable_scale_A`,
`trainable_shift_B`, `trainable_X`, `trainable_Y`, `F.relu(new_s)`). X·Y is not zero at the start, and the relu clips its
negative entries: training starts slightly off the base, and a start at zero would leave the relu without a gradient. The code returns
‖scaled − σ‖ + ‖X·Y‖ as a regulariser, to be weighted by the task: `reg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.errors import LabError
from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.methods._tuner import OwnLayer


@dataclass
class SaltKnobs(Knobs):
    k: int = knob(4, "How many top singular values are scaled and shifted.", low=1)
    r: int = knob(2, "Rank of the change of the rest of the spectrum.", low=1, size=True)
    reg: float = knob(0.0, "Weight of the regulariser in the loss.", low=0)


class Salt(OwnMethod):
    """SALT: SaltConfig(k, r, reg)."""

    id, name = "salt", "SALT"
    paper = Paper("SALT: Singular Value Adaptation with Low-Rank Transformation", "2503.16055")
    kind = "weight update"
    summary = "Top singular values scaled and shifted, the remaining spectrum changed by a low-rank matrix."
    equation = r"W' = U\,\mathrm{relu}\begin{pmatrix}\mathrm{diag}(a\,\sigma_{1..k} + b) & 0\\ 0 & \mathrm{diag}(\sigma_{k+1..p}) + XY\end{pmatrix} V^\top"
    knobs = SaltKnobs
    learning_rate = 2e-3
    identity_start = False
    tensors = {
        "trained": {"a": "k", "b": "k", "X": "(p−k) × r", "Y": "r × (p−k)"},
        "frozen": {"U": "m × p", "S": "p", "V": "p × n"},
    }
    remark = "Starts slightly off the base, as the released code does. Needs all singular vectors of every layer: as much memory as two copies of the weights."

    def check(self, layer: Layer, knobs: SaltKnobs) -> None:
        if knobs.k >= min(layer.m, layer.n):
            raise LabError(
                f"k is {knobs.k}, but layer {layer.name} is {layer.m}×{layer.n}: take less than {min(layer.m, layer.n)}."
            )

    def count_layer(self, layer: Layer, knobs: SaltKnobs) -> int:
        return 2 * knobs.k + 2 * knobs.r * (min(layer.m, layer.n) - knobs.k)

    def derived(self, knobs: SaltKnobs) -> tuple[str, ...]:
        return ("U", "V")

    def shapes(self, layer: Layer, knobs: SaltKnobs) -> dict[str, tuple[int, ...]]:
        p = min(layer.m, layer.n)
        return {"U": (layer.m, p), "S": (p,), "V": (p, layer.n)}

    def init(self, start: Start, knobs: SaltKnobs) -> Tensors:
        from lab import svd

        W = start.weight()
        U, S, Vh = svd.basis(W, min(W.shape))
        rest = S.numel() - knobs.k
        X, Y = start.randn(rest, knobs.r, scale=0.01), start.randn(knobs.r, rest, scale=0.01)
        trained = {"a": start.zeros(knobs.k) + 1, "b": start.zeros(knobs.k), "X": X, "Y": Y}
        return Tensors(trained, {"U": U, "S": S, "V": Vh})

    def core(self, t: Mapping[str, torch.Tensor], knobs: SaltKnobs) -> torch.Tensor:
        """relu(S') − diag(σ), (p, p)."""
        import torch

        k, S = knobs.k, t["S"]
        top, rest = (t["a"] * S[:k] + t["b"]).diag(), S[k:].diag() + t["X"] @ t["Y"]
        return torch.block_diag(top, rest).relu() - S.diag()

    def delta(self, t: Mapping[str, torch.Tensor], knobs: SaltKnobs, layer: Layer) -> torch.Tensor:
        return t["U"] @ self.core(t, knobs) @ t["V"]

    def forward(self, site: OwnLayer, x: torch.Tensor, t: Mapping[str, torch.Tensor], knobs: SaltKnobs) -> torch.Tensor:
        return site.low_rank(x, t["U"] @ self.core(t, knobs), t["V"])

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        total = None
        for _, site, adapter in self.sites(model):
            t, knobs = site.tensors(adapter), site.knobs[adapter]
            if knobs.reg:
                S = t["S"][: knobs.k]
                term = knobs.reg * ((t["a"] * S + t["b"] - S).norm() + (t["X"] @ t["Y"]).norm())
                total = term if total is None else total + term
        return total


register(Salt())
