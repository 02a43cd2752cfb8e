"""LoRA of a lower rank: truncated SVD, the ranks shared out over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab.compress import Fit, Plan, below_floor, register

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lab.compress._update import Goal


class LoraFit(Fit):
    """ΔW_r = U_rΣ_rV_rᵀ, the best of its rank (Eckart–Young), from the factors where there are some.

    With a budget every layer gets the rank it earns: singular values of all layers sorted by σ²/(m + n), what one more
    rank takes off the squared error for each parameter it costs, and taken from the top while they fit. With r given
    all layers get that rank.
    """

    id, order = "lora", 1
    how = "closed form: truncated SVD, ranks shared out by σ² per parameter"

    def plan(self, goals: Sequence[Goal], budget: int | None, given: Mapping[str, Any]) -> Plan:
        if budget is None or "r" in given:
            return super().plan(goals, budget, given)
        from lab import budget as budgets

        limit = budgets.check_budget(budget)
        steps = []
        for number, goal in enumerate(goals):
            cost = goal.layer.m + goal.layer.n
            values = goal.matrix().svd()[1].square().tolist()
            largest = max(values, default=0.0)
            steps += [(-value / cost, number, cost) for value in values if value > 1e-24 * largest]
        ranks, spent = dict.fromkeys((goal.layer.name for goal in goals), 0), 0
        for _, number, cost in sorted(steps):
            if spent + cost > limit:  # nothing smaller is taken instead: so the error falls with every larger budget
                break
            ranks[goals[number].layer.name] += 1
            spent += cost
        if not spent:
            raise below_floor(
                self.method, limit, sorted(steps)[0][2], len(goals), "rank 1 on the layer that needs it most"
            )
        return Plan(self.knobs({**given, "r": max(ranks.values())}), spent, ranks)

    def attach(self, network: torch.nn.Module, goals: Sequence[Goal], plan: Plan, seed: int) -> PeftModel:
        from peft import get_peft_model

        if not plan.ranks:
            return super().attach(network, goals, plan, seed)
        ranks = {name: rank for name, rank in plan.ranks.items() if rank}
        knobs = replace(plan.knobs, alpha=0.0)
        config: Any = self.method.config(knobs, list(ranks), seed)
        config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != knobs.r}
        config.alpha_pattern = dict(config.rank_pattern)
        return get_peft_model(network, config)

    def solve(self, goal: Goal, t: Mapping[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        """`t` holds lora_A and lora_B as the layer has them, and the scale between them and ΔW."""
        from lab.compress._update import rounded

        rank = t["lora_A"].shape[0]
        U, S, Vh = goal.matrix().svd()
        root = (S[:rank] / t["scale"].double()).sqrt()
        B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
        missing = rank - root.numel()  # more rank than the update has
        if missing:
            B = B.new_zeros(B.shape[0], rank).index_copy_(1, B.new_tensor(range(root.numel())).long(), B)
            A = A.new_zeros(rank, A.shape[1]).index_copy_(0, A.new_tensor(range(root.numel())).long(), A)
        B, A = rounded(B, A)
        return {"lora_A": A.reshape(t["lora_A"].shape), "lora_B": B.reshape(t["lora_B"].shape)}


register(LoraFit())
