"""PRANC: ΔW is linear in α, so least squares over its k pseudo-random matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lab.compress import Fit, register

if TYPE_CHECKING:
    import torch

    from lab.compress._update import Goal


class PrancFit(Fit):
    """α = argmin ‖Σαᵢvᵢ − ΔW‖: a projection where the Hadamard rows are orthogonal (m·n a power of two), else conjugate
    gradients through the method's own code."""

    id, order = "pranc", 4
    how = "linear least squares over the pseudo-random basis"

    def solve(self, goal: Goal, t: Mapping[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        from lab.compress._least_squares import Affine, own_cache, solve

        method: Any = self.method
        with own_cache(knobs) as roomy:
            update = Affine(lambda alpha: method.delta({"alpha": alpha}, roomy, goal.layer), knobs.k)
            return {"alpha": solve(update, goal.matrix().full().float(), passes=4)}


register(PrancFit())
