"""LoRA-XS: ΔW = s·B·R·A with B and A frozen, so R = B⁺·ΔW·A⁺/s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lab.compress import Fit, register

if TYPE_CHECKING:
    import torch

    from lab.compress._update import Goal


class LoraXsFit(Fit):
    """B = U_rΣ_r has orthogonal columns and A = V_rᵀ orthonormal rows: R = Σ⁻¹·Uᵀ·ΔW·V/s, the exact minimum."""

    id, order = "lora-xs", 5
    how = "closed form: Σ⁻¹·Uᵀ·ΔW·V of the base's singular vectors"
    preset = {"sigma": 0.0}

    def solve(self, goal: Goal, t: Mapping[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        from lab.compress._update import rounded

        B, A = t["B"].double(), t["A"].double()
        square = B.square().sum(0)  # σᵢ²; a weight of lower rank has zeros, whose rows of R do nothing
        scale = square.where(square > 1e-24 * square.max(), square.new_tensor(float("inf")))
        R = goal.matrix().within(B, A.T).full() / scale[:, None] / knobs.scale
        return dict(zip(("R",), rounded(R), strict=True))


register(LoraXsFit())
