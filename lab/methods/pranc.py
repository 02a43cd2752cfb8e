"""PRANC: pseudo-random networks for compacting deep models (Nooralinejad et al., ICCV 2023, arXiv 2206.08464).

vec(ΔW) = s·Σ_{i≤k} αᵢ·vᵢ over frozen pseudo-random vectors vᵢ of m·n entries, α = 0 at the start: the baseline of the
NOLA paper. The original compresses a whole network into one vector; as in NOLA's comparison, each layer has its own
coefficients here. A plain basis costs k·m·n a step, so beyond small layers the default is the Walsh–Hadamard basis,
whose combination costs N·log N (lab/methods/_basis.py).

The original's code: github.com/UCDvision/PRANC, main_1gpu.py (commit 21a7d92, `fill_net`) and utils.py (commit 04c2776,
`fill_basis_mat`). There vᵢ is a freshly started network, seeded by i: uniform in ±1/√fan_in layer by layer, where ours is
U(−1, 1)/√k, as NOLA's; and α starts at (1, 0, …, 0), the first of these networks, where an update starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch

SMALL = 1 << 24  # basis entries of a layer up to which the plain basis is taken by default


@dataclass
class PrancKnobs(Knobs):
    k: int = knob(256, "Coefficients a layer.", low=1, size=True)
    basis: str = knob(
        "auto",
        "The frozen basis: uniform numbers, Walsh–Hadamard rows, or the first on small layers and the second on others.",
        choices=("auto", "uniform", "hadamard"),
    )
    scale: float = knob(1.0, "Factor s of the update.", low=1e-6)
    cache_mib: int = knob(64, "Memory that all layers' bases may keep between steps, in MiB.", low=0)


class Pranc(OwnMethod):
    """A weight update as a combination of random vectors: PrancConfig(k, seed, basis, scale, cache_mib)."""

    id, name, order = "pranc", "PRANC", 4
    paper = Paper("PRANC: Pseudo RAndom Networks for Compacting deep models", "2206.08464")
    kind = "weight update"
    summary = "The update is a linear combination of frozen random matrices of the weight's own size."
    equation = r"\mathrm{vec}(\Delta W) = s\sum_{i=1}^{k} \alpha_i v_i"
    knobs = PrancKnobs
    positional = ("k", "seed", "basis", "scale", "cache_mib")
    tensors = {"trained": {"α": "k"}, "frozen": {"v_i": "k of m × n, from the seed", "W": "m × n"}}
    remark = "One coefficient vector a layer, as in the NOLA paper's comparison; the original has one for the network."

    def kind_of_basis(self, layer: Layer, knobs: PrancKnobs) -> str:
        if knobs.basis != "auto":
            return knobs.basis
        return "uniform" if knobs.k * layer.m * layer.n <= SMALL else "hadamard"

    def check(self, layer: Layer, knobs: PrancKnobs) -> None:
        if self.kind_of_basis(layer, knobs) == "hadamard" and knobs.k > layer.m * layer.n:
            raise LabError(
                f"k is {knobs.k}, more than the {layer.m * layer.n} entries of layer {layer.name}: lower it."
            )

    def count_layer(self, layer: Layer, knobs: PrancKnobs) -> int:
        return knobs.k

    def cached(self, layer: Layer, knobs: PrancKnobs) -> int:
        entries = layer.m * layer.n
        return knobs.k * entries if self.kind_of_basis(layer, knobs) == "uniform" else 8 * knobs.k + entries

    def init(self, start: Start, knobs: PrancKnobs) -> Tensors:
        return Tensors({"alpha": start.zeros(knobs.k)})

    def delta(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> torch.Tensor:
        from lab import counter
        from lab.methods import _basis

        key = counter.key("pranc", knobs.seed, layer.name)
        flat = _basis.combine(
            t["alpha"], self.kind_of_basis(layer, knobs), key, layer.m * layer.n, knobs.cache_mib << 20
        )
        return (flat if knobs.scale == 1 else flat * knobs.scale).view(layer.m, layer.n)


pranc = register(Pranc())
