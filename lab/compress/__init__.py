"""Compress: a trained update written anew by another method at a smaller size, by least squares on ΔW, without data.

    compress(unet, updates, "nora", 20_000, Path("small"))

ADD A FIT: one file in this folder that registers a `Fit` for a method of the registry. `_engine.py` does what all share:
checks, attaching through the method's own tuner, saving, loading again, and measuring what the file gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import METHODS
from lab.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import PeftModel

    from lab.compress._update import Goal
    from lab.methods.deltas import Delta
    from lab.methods.spec import Layer, Method


@dataclass(frozen=True)
class Plan:
    """Settings for a budget: the method's knobs, the parameters they cost, and, where layers differ, each one's rank
    (a layer of rank 0 gets no adapter)."""

    knobs: Any
    parameters: int
    ranks: Mapping[str, int] = field(default_factory=dict)


class Fit:
    """How one method's parameters are found for a given update. Subclass, register an instance."""

    id: str  # the method's
    how: str  # in one sentence, shown beside the result
    order = 100
    only: Mapping[str, tuple[Any, ...]] = {}  # settings that a fit without data allows, where not all
    preset: Mapping[str, Any] = {}  # settings in place of the method's defaults, which are made for training

    @property
    def method(self) -> Method:
        return METHODS[self.id]

    def knobs(self, given: Mapping[str, Any]) -> Any:
        """The method's settings. Raises LabError on names and values that do not fit, or need training data."""
        knobs = self.method.knobs.parse({**self.preset, **given})
        for name, allowed in self.only.items():
            if getattr(knobs, name) not in allowed:
                raise LabError(
                    f"{self.method.name} with {name}={getattr(knobs, name)} cannot be fitted without training data: "
                    f"take {' or '.join(map(str, allowed))}."
                )
        return knobs

    def plan(self, goals: Sequence[Goal], budget: int | None, given: Mapping[str, Any]) -> Plan:
        """The largest settings within the budget; without one, the settings as given. Raises LabError when the
        budget is below the method's floor on these layers."""
        return within(self.method, [goal.layer for goal in goals], budget, self.knobs(given), given)

    def attach(self, network: torch.nn.Module, goals: Sequence[Goal], plan: Plan, seed: int) -> PeftModel:
        return self.method.attach(network, plan.knobs, [goal.layer.name for goal in goals], seed=seed)

    def solve(self, goal: Goal, t: Mapping[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        """The trained tensors by name that come nearest to the goal, for the layer's tensors `t` as attached."""
        raise NotImplementedError(f"{type(self).__name__} must say how its tensors are found")


def within(method: Method, layers: list[Layer], budget: int | None, start: Any, held: Mapping[str, Any]) -> Plan:
    """The settings whose count is the largest that does not exceed the budget, those in `held` as they are.

    `lab.budget.solve` gives the nearest count on either side. Where that is above, it is asked again as far below, and
    twice as far each time, until it answers with one that is not: nothing in between is passed over, because all of it
    would have been nearer.
    """
    from lab import budget as budgets

    if budget is None:
        budgets.check(method, layers, start)
        return Plan(start, budgets.count(method, layers, start))
    limit = budgets.check_budget(budget)
    asked, found = limit, budgets.solve(method, layers, limit, start, fixed=held)
    while found.count > limit and 2 * asked > found.count and found.reachable:
        asked -= found.count - asked
        found = budgets.solve(method, layers, asked, start, fixed=held)
    if found.count > limit:
        least = budgets.solve(method, layers, 1, start, fixed=held)
        raise below_floor(method, limit, least.count, len(layers), budgets.describe(method, least.knobs))
    return Plan(found.knobs, found.count)


def below_floor(method: Method, budget: int, least: int, layers: int, settings: str) -> LabError:
    return LabError(
        f"A budget of {budget:,} parameters is too small for {method.name} on these {layers} layers: it needs at least "
        f"{least:,}{f' ({settings})' if settings else ''}; raise the budget or choose another method."
    )


FITS: Registry[Fit] = Registry("compression", "lab.compress")
register = FITS.register


def compress(
    network: torch.nn.Module, updates: Mapping[str, Delta], id: str, budget: int | None, out: Path, **options: Any
) -> dict[str, Any]:
    """See `lab.compress._engine.compress`."""
    from lab.compress._engine import compress as run

    return run(network, updates, id, budget, out, **options)
