"""The parameter budget: knobs → parameters, bytes, memory; and parameters → knobs. Imports no torch.

Counts are the methods' closed forms (lab/methods); tests hold them against what PEFT really instantiates.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lab.errors import LabError
from lab.methods.spec import Knobs, Layer, Method

PRECISIONS = {"fp32": 32, "bf16": 16, "8 bit": 8, "4 bit": 4, "3 bit": 3, "2 bit": 2}
MAX_BUDGET = 10**12
SAME = 1e-3  # for knobs that are fractions: misses below this share of the budget count as equally near


# -- forwards ------------------------------------------------------------------------------------------
def count(method: Method, layers: Sequence[Layer], knobs: Any) -> int:
    """Trainable parameters of the method on these layers.

    Layers of one shape are counted once and multiplied, unless the method shares tensors between layers.
    """
    if type(method).count is not Method.count:
        return method.count(layers, knobs)
    return sum(times * method.count_layer(layer, knobs) for layer, times in shapes(layers))


def check(method: Method, layers: Sequence[Layer], knobs: Any) -> None:
    """Raise LabError, naming the layer, when the settings do not fit one of the layers."""
    for layer, _ in shapes(layers):
        if layer.kernel and not method.conv:
            raise LabError(f"{method.name} does not adapt convolutions ({layer.name}): choose linear layers for it.")
        method.check(layer, knobs)
        rank = getattr(knobs, "r", None)
        if method.low_rank and isinstance(rank, int) and rank > min(layer.m, layer.n):
            raise LabError(
                f"Rank {rank} is above the size of layer {layer.name}, {layer.m}×{layer.n}: "
                f"take at most {min(layer.m, layer.n)}."
            )


@dataclass
class Known:
    """What is remembered of a list of layers: one of each shape with how many there are, and what the search found."""

    layers: Sequence[Layer]
    length: int
    shapes: list[tuple[Layer, int]]
    facts: dict[Any, Any] = dataclasses.field(default_factory=dict)


_lists: dict[int, Known] = {}


def known(layers: Sequence[Layer]) -> Known:
    """What is known of the layers; remembered for the lists seen last."""
    found = _lists.get(id(layers))
    if found is not None and found.layers is layers and found.length == len(layers):
        return found
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for layer in layers:
        key = (layer.out, layer.in_, layer.kernel, layer.role, layer.bias)
        groups.setdefault(key, [layer, 0])[1] += 1
    if len(_lists) > 32:
        _lists.clear()
    _lists[id(layers)] = made = Known(layers, len(layers), [(layer, times) for layer, times in groups.values()])
    return made


def shapes(layers: Sequence[Layer]) -> list[tuple[Layer, int]]:
    """One layer of each shape and how many there are of it."""
    return known(layers).shapes


def sizes(parameters: int) -> dict[str, int]:
    """Bytes of the tensors of a file with so many parameters, by precision (headers and scales left out)."""
    return {name: math.ceil(parameters * bits / 8) for name, bits in PRECISIONS.items()}


def knob_fields(method: Method, *, size: bool = False) -> list[dataclasses.Field[Any]]:
    """The method's settings; only those that decide the count when `size`."""
    fields = [f for f in dataclasses.fields(method.knobs) if "help" in f.metadata]
    return [f for f in fields if f.metadata["size"]] if size else fields


def describe(method: Method, knobs: Any) -> str:
    """The size knobs in words: "rank 1", "k = 128, l = 128"."""
    parts = [(f.name, getattr(knobs, f.name)) for f in knob_fields(method, size=True)]
    if len(parts) == 1 and parts[0][0] in ("r", "rank", "init_r"):
        return f"rank {parts[0][1]}"
    return ", ".join(
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in parts
    )


# -- backwards -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Solution:
    """Settings whose count is the nearest to a budget that the method reaches on these layers."""

    knobs: Any
    count: int
    miss: int  # count − budget
    note: str = ""  # why the budget is not reached, in one sentence
    reachable: bool = True  # False: below the method's floor or above its ceiling


def check_budget(n: Any) -> int:
    """A budget as a whole number. Raises LabError unless it is between 1 and 10¹²."""
    try:
        number = float(str(n).replace(",", "").replace("_", "").strip())
    except ValueError:
        raise LabError(f"A budget is a number of parameters, got '{n}'.") from None
    if not math.isfinite(number) or not number.is_integer():
        raise LabError(f"A budget is a whole number of parameters, got {n}.")
    if number < 1:
        raise LabError(f"A budget is at least 1 parameter, got {int(number):,}.")
    if number > MAX_BUDGET:
        raise LabError(
            f"A budget of {int(number):,} parameters is larger than any model here: give at most {MAX_BUDGET:,}."
        )
    return int(number)


def solve(
    method: Method,
    layers: Sequence[Layer],
    n: Any,
    start: Any = None,
    fixed: Collection[str] = (),
) -> Solution:
    """The settings of the method whose count on these layers is nearest to `n`.

    The knobs marked `size` are turned, except those named in `fixed`; the others stay as in `start` (default: the
    method's defaults). Of equally near settings the ones closest to `start` are taken (for a knob that is a fraction,
    all that miss by less than 0.1 % are equally near). A budget below
    the floor or above the ceiling gives the floor's or ceiling's settings and a note that says so. Raises LabError on
    a budget that is no number from 1 to 10¹², and when the method does not fit the layers at any size.
    """
    budget = check_budget(n)
    if not layers:
        raise LabError("No layers were chosen to spend the budget on.")
    from lab.budget_search import Search

    start = start if start is not None else method.knobs()
    turned = [f for f in knob_fields(method, size=True) if f.name not in fixed]
    search = Search(method, layers, start, turned)
    if not turned:
        return _fixed(method, layers, start, budget)
    best = search.nearest(budget)
    miss = best.count - budget
    note = ""
    if miss and not search.passes(budget):
        best = search.extreme(low=miss > 0)
        miss, word = best.count - budget, "floor" if miss > 0 else "ceiling"
        note = f"{method.name}'s {word} here is {best.count:,}: {describe(method, best.knobs)}"
    return Solution(best.knobs, best.count, miss, note, reachable=not note)


def _fixed(method: Method, layers: Sequence[Layer], knobs: Any, budget: int) -> Solution:
    check(method, layers, knobs)
    total = count(method, layers, knobs)
    note = f"{method.name} has no size to turn: it has {total:,} here" if total != budget else ""
    return Solution(knobs, total, total - budget, note, reachable=not note)


# -- settings of the method from the page or the command line --------------------------------------------
def settings(method: Method, given: dict[str, Any]) -> Knobs:
    """The method's knobs from `name=value` settings; raises LabError on names and values that do not fit."""
    return method.knobs.parse(given)


def as_dict(knobs: Any) -> dict[str, Any]:
    return dataclasses.asdict(knobs)


def is_whole(field: dataclasses.Field[Any], method: Method) -> bool:
    """Whether a knob takes whole numbers alone."""
    kind = typing.get_type_hints(method.knobs)[field.name]
    kinds = typing.get_args(kind) or (kind,)
    return int in kinds and float not in kinds and bool not in kinds
