"""NoRA: the outer factors are the base's own singular vectors, the inner ones a truncated SVD between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab.compress import Fit, Plan, register, within

if TYPE_CHECKING:
    import torch

    from lab.compress._update import Goal

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of the inner factors, tried within a budget
FRACTIONS = 10_000  # r_outer is looked for in these parts of a layer's smaller side, as lab.budget does


class NoraFit(Fit):
    """ΔW = s·U·X·Vᵀ with X of rank r_inner: the part of ΔW outside of the frames is lost, and inside the best X is the
    truncated SVD of UᵀΔWV/s. With the start value C = B'₀A'₀ taken off (identity_init), that of UᵀΔWV/s + C.

    identity_init is off unless asked for: it is there for training to start at the base model, and costs a fit
    r_inner of its rank to undo. Within a budget every r_inner is tried with the widest r_outer it leaves.
    """

    id, order = "nora", 2
    how = "closed form: truncated SVD of Uᵀ·ΔW·V between the base's singular vectors"
    only = {"outer": ("svd", "minor", "random")}
    preset = {"identity_init": False}

    def plan(self, goals: Sequence[Goal], budget: int | None, given: Mapping[str, Any]) -> Plan:
        knobs = self.knobs(given)
        if budget is None or {"r_outer", "r_inner"} & set(given) or knobs.outer != "svd" or knobs.identity_init:
            return super().plan(goals, budget, given)
        from lab import budget as budgets

        layers = [goal.layer for goal in goals]
        found = list(self._candidates(goals, budgets.check_budget(budget), knobs))
        if not found:  # not even r_outer = r_inner = 1, which says so
            return within(self.method, layers, budget, replace(knobs, r_outer=1, r_inner=1), {"r_inner": 1})
        errors = self._errors(goals, found)
        best = min(range(len(found)), key=lambda i: (errors[i], budgets.count(self.method, layers, found[i])))
        return Plan(found[best], budgets.count(self.method, layers, found[best]))

    def _candidates(self, goals: Sequence[Goal], limit: int, knobs: Any) -> Iterator[Any]:
        """For each r_inner, r_outer as wide as the budget allows: one number for all layers, and one share of each."""
        from lab import budget as budgets

        layers = [goal.layer for goal in goals]
        smallest = min(min(layer.m, layer.n) for layer in layers)
        widest = max(min(layer.m, layer.n) for layer in layers)

        def fits(value: Any, inner: int) -> bool:
            return budgets.count(self.method, layers, replace(knobs, r_outer=value, r_inner=inner)) <= limit

        for inner in (i for i in RANKS if i <= widest):
            whole = min(smallest, limit // (2 * inner * len(layers)))
            if whole >= inner:
                yield replace(knobs, r_outer=whole, r_inner=inner)
            low, high = -(-inner * FRACTIONS // smallest), FRACTIONS - 1  # r_outer ≥ r_inner on every layer
            if widest == smallest or low > high or not fits(low / FRACTIONS, inner):
                continue
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(middle / FRACTIONS, inner) else (low, middle - 1)
            yield replace(knobs, r_outer=low / FRACTIONS, r_inner=inner)

    def _errors(self, goals: Sequence[Goal], tried: list[Any]) -> list[float]:
        """Squared error of each candidate over all layers, up to what all share; one layer in memory at a time."""
        from lab import svd

        method: Any = self.method
        kept = [0.0] * len(tried)
        for goal in goals:
            wide = [method.outer_rank(goal.layer, knobs) for knobs in tried]
            basis = svd.basis(goal.weight(), max(wide))
            whole = goal.matrix().within(basis.U.double(), basis.Vh.double().T)
            for i, (r, knobs) in enumerate(zip(wide, tried, strict=True)):
                part = replace(whole, left=whole.left[:r] if whole.right is not None else whole.left[:r, :r],
                               right=whole.right[:, :r] if whole.right is not None else None)  # fmt: skip
                kept[i] -= float(part.svd()[1][: knobs.r_inner].square().sum())
        return kept

    def solve(self, goal: Goal, t: Mapping[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        import torch

        from lab.compress._update import rounded

        inside = goal.matrix().within(t["outer_b"].double() / knobs.scale, t["outer_a"].double().T)
        start = (t["start_b"].double(), t["start_a"].double()) if knobs.identity_init else None
        if start:
            inside = inside.plus(*start)
        U, S, Vh = inside.svd()
        rank = min(knobs.r_inner, S.numel())
        root = S[:rank].sqrt()
        b, a = torch.zeros_like(t["inner_b"], dtype=torch.float64), torch.zeros_like(t["inner_a"], dtype=torch.float64)
        b[:, :rank], a[:rank] = U[:, :rank] * root, root[:, None] * Vh[:rank]
        if start:  # of all pairs b·G, Gᵀ·a the one nearest to the start, which is taken off: fewer digits cancel
            P, _, Q = torch.linalg.svd(b.T @ start[0] + a @ start[1].T)
            b, a = b @ (P @ Q), (P @ Q).T @ a
        return dict(zip(("inner_b", "inner_a"), rounded(b, a), strict=True))


register(NoraFit())
