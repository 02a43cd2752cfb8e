"""LoCA: coefficients of an inverse cosine transform at learned frequencies (Du et al. 2025, arXiv 2502.06820).

ΔW = α·C_mᵀ·S·C_n: S (m×n) is zero but for k coefficients c at places l = (l₁, l₂), C the orthonormal DCT-II matrix. c starts
at zero, the places at random. In the first `search` of the steps, `c_steps` steps of learning c alternate with `l_steps` of
learning the places, afterwards only c learns. A place's gradient is the central difference of the loss's gradient Z
by the spectrum: ∂L/∂l₁ ≈ c·(Z[l₁+1, l₂] − Z[l₁−1, l₂])/2, held within ±1. Places are kept as real numbers, uniform over
the grid at the start, and used rounded. Official code: github.com/TL-UESTC/LoCA, peft/src/peft/tuners/loca/layer.py
(`IdctWithIndexGrad`, read in a public copy that checks itself against it bit by bit): c = 0, 10 steps of c and 20 of the
places in turn, in the first tenth of several thousand steps: a fifth here, where runs are short. There places are in units
of the side and learned at 1e-4: 0.1 grid steps where the side is 1000. The paper counts the k coefficients; the 2k
coordinates train too, and are counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class LocaKnobs(Knobs):
    k: int = knob(32, "How many frequencies each layer has.", low=1, size=True)
    scale: float = knob(1.0, "Factor α of the update.", low=1e-6)
    search: float = knob(0.2, "Share of the steps in which places are learned.", low=0, high=1)
    c_steps: int = knob(10, "Steps of learning coefficients before the places' turn.", low=1)
    l_steps: int = knob(20, "Steps of learning places before the coefficients' turn.", low=1)
    l_rate: float = knob(0.1, "Learning rate of the places, in grid steps.", low=0)


class Loca(OwnMethod):
    """LoCA: LocaConfig(k, scale, search, c_steps, l_steps, l_rate)."""

    id, name = "loca", "LoCA"
    paper = Paper("LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", "2502.06820")
    kind = "frequency"
    summary = "A few coefficients of the update's cosine transform, at frequencies that are learned too."
    equation = r"\Delta W = \alpha\, C_m^\top\, S(c, l)\, C_n,\qquad \tfrac{\partial L}{\partial l_1} \approx \tfrac{c}{2}\,(Z_{l_1+1,\,l_2} - Z_{l_1-1,\,l_2})"
    knobs = LocaKnobs
    learning_rate = 1e-3
    tensors = {"trained": {"c": "k", "places": "k × 2"}, "frozen": {}}
    remark = "Counts 3k numbers a layer: the paper counts the k coefficients, the 2k coordinates are learned besides."

    def count_layer(self, layer: Layer, knobs: LocaKnobs) -> int:
        return 3 * knobs.k

    def rank(self, layer: Layer, knobs: LocaKnobs) -> int:
        return min(knobs.k, layer.m, layer.n)

    def init(self, start: Start, knobs: LocaKnobs) -> Tensors:
        import torch

        m, n = start.layer.m, start.layer.n
        drawn = torch.rand(knobs.k, 2, generator=start.generator) * torch.tensor([m - 1.0, n - 1.0])
        return Tensors({"c": start.zeros(knobs.k), "places": drawn.to(start.device)})

    def stage(self, knobs: LocaKnobs, step: int, steps: int) -> str:
        turn = step % (knobs.c_steps + knobs.l_steps)
        return "places" if step < knobs.search * steps and turn >= knobs.c_steps else "coefficients"

    def staged(self, t: Mapping[str, torch.Tensor], stage: str, knobs: LocaKnobs) -> Mapping[str, torch.Tensor]:
        resting = "places" if stage == "coefficients" else "c"
        return {name: value.detach() if name == resting else value for name, value in t.items()}

    def delta(self, t: Mapping[str, torch.Tensor], knobs: LocaKnobs, layer: Layer) -> torch.Tensor:
        from lab.methods._cosine import Place, cosine

        spectrum = Place.apply(t["c"], t["places"], layer.m, layer.n)
        left, right = (cosine(size, t["c"].device) for size in (layer.m, layer.n))
        return (left.T @ spectrum @ right) * knobs.scale

    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        import torch

        found = [(site.tensors(a), site.knobs[a]) for _, site, a in self.sites(model)]
        places = [t["places"] for t, _ in found]
        others = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in places)]
        moving: dict[str, Any] = {"params": places, "lr": found[0][1].l_rate if found else lr, "weight_decay": 0.0}
        return torch.optim.AdamW([{"params": others}, moving], lr=lr, weight_decay=weight_decay)


register(Loca())
