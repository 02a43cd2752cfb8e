"""LoLDU: the diagonal of the weight's LDU decomposition, trained (Shi et al. 2024, arXiv 2410.13618).

W = P·L·D·U (permutation, unit lower triangle, diagonal, unit upper triangle, from LU with partial pivoting).
W' = W_res + c·P·L_r·diag(z)·U_r with z (r) started at D_r and the scalar c at alpha/r, both trained, and
W_res = W − c₀·P·L_r·D_r·U_r. As an update: ΔW = P·L_r·diag(c·z − c₀·D_r)·U_r. Official code: github.com/SKDDJ/LoLDU (commit 9790d90),
minloldu/loldu.py (`LoLDUParametrization`, init_method "lu"): the paper counts r numbers, the code also trains c.
The first r columns and rows are whatever pivoting left there: unlike singular vectors they depend on the rows' order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods import register
from lab.methods._common import check_rank
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class LolduKnobs(Knobs):
    r: int = knob(8, "How many entries of the diagonal are trained.", low=1, size=True)
    scale: float = knob(1.0, "Start of the trained factor c (the paper's alpha / r).", low=1e-6)


class Loldu(OwnMethod):
    """LoLDU: LolduConfig(r, scale)."""

    id, name = "loldu", "LoLDU"
    paper = Paper(
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
        "2410.13618",
    )
    kind = "weight update"
    summary = "Part of the diagonal of the weight's triangular (LDU) decomposition, and one factor, trained."
    equation = r"\Delta W = P L_r\,\mathrm{diag}(c\,z - c_0 D_r)\,U_r"
    knobs = LolduKnobs
    learning_rate = 3e-4
    low_rank = True
    tensors = {"trained": {"z": "r", "c": "1"}, "frozen": {"L": "m × r", "U": "r × n", "start": "r"}}
    product = ("L", "z", "U")
    remark = "Counts r + 1 numbers a layer: the released code trains the factor c besides the diagonal."

    def check(self, layer: Layer, knobs: LolduKnobs) -> None:
        check_rank(layer, knobs.r)

    def count_layer(self, layer: Layer, knobs: LolduKnobs) -> int:
        return knobs.r + 1

    def rank(self, layer: Layer, knobs: LolduKnobs) -> int:
        return knobs.r

    def derived(self, knobs: LolduKnobs) -> tuple[str, ...]:
        return ("L", "U")

    def init(self, start: Start, knobs: LolduKnobs) -> Tensors:
        PL, D, U = ldu(start.weight(), knobs.r)
        return Tensors({"z": D, "c": start.zeros(1) + knobs.scale}, {"L": PL, "U": U, "start": knobs.scale * D})

    def factors(self, t: Mapping[str, torch.Tensor], knobs: LolduKnobs, layer: Layer) -> Any:
        return t["L"] * (t["c"] * t["z"] - t["start"]), t["U"]


def ldu(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P·L_r (m, r), D_r (r,), U_r (r, n): the first r terms of W = P·L·diag(D)·U.

    A pivot of zero leaves its row of U undivided, with 1 in D: the product is the same.
    """
    import torch

    P, L, U = torch.linalg.lu(weight.double())
    D = U.diagonal()[:r]
    D = torch.where(D == 0, torch.ones_like(D), D)
    return (P @ L[:, :r]).float(), D.float(), (U[:r] / D[:, None]).float()


register(Loldu())
