"""The parameter budget: knobs → parameters, bytes, memory; and parameters → knobs. Imports no torch.

Counts are the methods' closed forms (lab/methods); tests hold them against what PEFT really instantiates.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
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
    return sum(times * method.count_layer(layer, knobs) for layer, times in _shapes(layers))


def check(method: Method, layers: Sequence[Layer], knobs: Any) -> None:
    """Raise LabError, naming the layer, when the settings do not fit one of the layers."""
    for layer, _ in _shapes(layers):
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
class _Known:
    """What is remembered of a list of layers: one of each shape with how many there are, and what the search found."""

    layers: Sequence[Layer]
    length: int
    shapes: list[tuple[Layer, int]]
    facts: dict[Any, Any] = dataclasses.field(default_factory=dict)


_lists: dict[int, _Known] = {}


def _known(layers: Sequence[Layer]) -> _Known:
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
    _lists[id(layers)] = made = _Known(layers, len(layers), [(layer, times) for layer, times in groups.values()])
    return made


def _shapes(layers: Sequence[Layer]) -> list[tuple[Layer, int]]:
    """One layer of each shape and how many there are of it."""
    return _known(layers).shapes


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
    start = start if start is not None else method.knobs()
    turned = [f for f in knob_fields(method, size=True) if f.name not in fixed]
    search = _Search(method, layers, start, turned)
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


@dataclass(frozen=True)
class _Point:
    knobs: Any
    count: int


class _Search:
    """Looks for settings by count. A knob's value is addressed by a whole number u: itself for whole-number knobs,
    in ten-thousandths for fractions. Counts are taken to grow (or fall) with u; where settings in between do not fit
    the layers (divisors, powers of two), every value that fits is tried."""

    def __init__(
        self, method: Method, layers: Sequence[Layer], start: Any, turned: list[dataclasses.Field[Any]]
    ) -> None:
        self.method, self.layers, self.start, self.turned = method, layers, start, turned
        self.names = [f.name for f in turned]
        self.largest = max(max(layer.m, layer.n) for layer in layers)
        self.origin = tuple(self._address(f) for f in turned)
        self.same = SAME if any(self._fraction(f) for f in turned) else 0.0
        self.seen: dict[tuple[int, ...], _Point | None] = {}
        self.errors: list[LabError] = []

    # -- addresses ---------------------------------------------------------------------------------------
    def _fraction(self, field: dataclasses.Field[Any]) -> bool:
        value = getattr(self.start, field.name)
        return isinstance(value, float) and value < 1

    def _address(self, field: dataclasses.Field[Any]) -> int:
        value = getattr(self.start, field.name)
        return max(1, round(value * 10_000)) if self._fraction(field) else max(self._low(field), int(value))

    def _low(self, field: dataclasses.Field[Any]) -> int:
        low = field.metadata["low"]
        if self._fraction(field):
            return 1
        return max(1, math.ceil(low)) if low is not None else 1

    def _high(self, field: dataclasses.Field[Any]) -> int:
        high = field.metadata["high"]
        if self._fraction(field):
            return 9_999
        return int(high) if high is not None and math.isfinite(high) else MAX_BUDGET

    def at(self, address: tuple[int, ...]) -> _Point | None:
        """The point at an address; None where the settings do not fit."""
        if address not in self.seen:
            values = {f.name: u / 10_000 if self._fraction(f) else u for f, u in zip(self.turned, address, strict=True)}
            try:
                knobs = dataclasses.replace(self.start, **values)
                check(self.method, self.layers, knobs)
                self.seen[address] = _Point(knobs, count(self.method, self.layers, knobs))
            except LabError as error:
                self.errors.append(error)
                self.seen[address] = None
        return self.seen[address]

    # -- one knob ------------------------------------------------------------------------------------------
    def _along(self, i: int, address: tuple[int, ...], budget: int) -> list[_Point]:
        """Points on both sides of the budget when knob i alone is turned from `address`."""

        def at(u: int) -> _Point | None:
            return self.at((*address[:i], u, *address[i + 1 :]))

        low, high = self._low(self.turned[i]), self._high(self.turned[i])
        if not self._is_range(i):
            near = range(low, min(high, 512) + 1)
            tried = sorted({*near, *(d for d in _divisors(self.layers) if low <= d <= high), address[i]})
        elif at(address[i]):
            tried = _crossing(address[i], low, high, at, budget)
        elif inside := next((u for u in _grid(low, high, self.largest) if at(u)), None):
            tried = _crossing(inside, low, high, at, budget)
        else:
            tried = []
        return [p for u in tried if (p := at(u))]

    def _is_range(self, i: int) -> bool:
        """Whether the values of knob i that fit the layers are one stretch of whole numbers (others are divisors of
        the layers' sides or powers of two); found out once for these layers and remembered with them."""
        others = tuple((f.name, getattr(self.start, f.name)) for f in knob_fields(self.method) if f not in self.turned)
        facts, key = _known(self.layers).facts, (self.method.id, self.names[i], others)
        if key not in facts:
            grid = _grid(self._low(self.turned[i]), self._high(self.turned[i]), self.largest)
            fits = [bool(self.at((*self.origin[:i], u, *self.origin[i + 1 :]))) for u in grid]
            if any(fits):
                first, last = fits.index(True), len(fits) - 1 - fits[::-1].index(True)
                facts[key] = all(fits[first : last + 1])
            else:  # none beside these settings of the others: taken as a range, and asked again
                return True
        return facts[key]

    # -- all knobs -----------------------------------------------------------------------------------------
    def nearest(self, budget: int) -> _Point:
        """The point whose count is nearest to the budget. Raises LabError when nothing fits."""
        found: list[_Point] = []
        centres = {self.origin}
        if len(self.turned) > 1:
            centres |= set(self._scaled(budget))
        for centre in centres:
            for i in range(len(self.turned)):
                found += self._along(i, centre, budget)
        if len(self.turned) > 1 and found:
            found += self._refined(min(found, key=lambda p: self._order(p, budget)), budget)
        if not found:
            raise self.errors[0] if self.errors else LabError(f"{self.method.name} fits none of these layers.")
        return min(found, key=lambda p: self._order(p, budget))

    def _refined(self, point: _Point, budget: int) -> list[_Point]:
        """Neighbours of the best point in each knob, with the others searched along."""
        centre = self._of(point)
        if abs(point.count - budget) <= self.same * budget:
            return []
        found: list[_Point] = []
        for i in range(len(centre)):
            for step in (-2, -1, 1, 2):
                moved = (*centre[:i], max(self._low(self.turned[i]), centre[i] + step), *centre[i + 1 :])
                for j in range(len(centre)):
                    if j != i:
                        found += self._along(j, moved, budget)
        return found

    def _of(self, point: _Point) -> tuple[int, ...]:
        values = [getattr(point.knobs, f.name) for f in self.turned]
        return tuple(
            round(v * 10_000) if self._fraction(f) else int(v) for f, v in zip(self.turned, values, strict=True)
        )

    def _scaled(self, budget: int) -> Iterable[tuple[int, ...]]:
        """The start's knobs all made larger or smaller by one factor, where the count crosses the budget; and the
        smallest and second smallest settings of each knob, for budgets near the floor."""

        def scaled(t: float) -> tuple[int, ...]:
            pairs = zip(self.turned, self.origin, strict=True)
            return tuple(min(self._high(f), max(self._low(f), round(u * t))) for f, u in pairs)

        low, high = 1e-6, 1.0
        while high < 1e9 and (p := self.at(scaled(high))) and p.count < budget:
            high *= 2
        for _ in range(40):
            middle = math.sqrt(low * high)
            p = self.at(scaled(middle))
            low, high = (middle, high) if p and p.count < budget else (low, middle)
        yield scaled(low)
        yield scaled(high)
        yield tuple(self._low(f) for f in self.turned)
        for i, f in enumerate(self.turned):
            yield (*self.origin[:i], self._low(f), *self.origin[i + 1 :])

    def _order(self, point: _Point, budget: int) -> tuple[float, float, int]:
        miss = abs(point.count - budget)
        moved = [abs(math.log(u / o)) for u, o in zip(self._of(point), self.origin, strict=True)]
        far = max(moved) + 0.1 * sum(moved)  # all knobs together rather than one far
        return (0.0 if miss <= self.same * budget else float(miss), round(far, 6), miss)

    def passes(self, budget: int) -> bool:
        """Whether counts on both sides of the budget were seen: it lies between the floor and the ceiling."""
        counts = [p.count for p in self.seen.values() if p]
        return min(counts) <= budget <= max(counts)

    def extreme(self, *, low: bool) -> _Point:
        """The smallest (or largest) count that the method reaches."""
        self.nearest(1 if low else MAX_BUDGET)
        points = [p for p in self.seen.values() if p]
        return min(points, key=lambda p: p.count) if low else max(points, key=lambda p: p.count)


def _grid(low: int, high: int, largest: int) -> list[int]:
    """Growing whole numbers from low to high, dense at first; past every layer's size, in powers of four."""
    values: list[int] = []
    u = low
    while u < high:
        values.append(u)
        u = max(u + 1, math.floor(u * (1.25 if u < 2 * largest else 4.0)))
    return [*values, high]


def _divisors(layers: Sequence[Layer]) -> list[int]:
    """Divisors of the layers' sides, which are the only block sizes that some methods take."""
    sides = {side for layer, _ in _shapes(layers) for side in (layer.m, layer.n)}
    return sorted(
        {d for side in sides for i in range(1, math.isqrt(side) + 1) if side % i == 0 for d in (i, side // i)}
    )


def _crossing(start: int, low: int, high: int, at: Callable[[int], _Point | None], budget: int) -> list[int]:
    """Values next to where the count crosses the budget, looked for from `start`, which fits; where it does not cross
    it, the last value that fits on that side. Counts nearly proportional to the value take a handful of looks."""

    def looked(u: int) -> _Point:
        point = at(u)
        assert point is not None  # start, and what lies between two values that fit
        return point

    here = looked(start).count
    other = at(min(high, 2 * start)) or at(max(low, start // 2))
    twice = at(min(high, 2 * start)) is not None
    grows = other is None or (other.count >= here) == twice or other.count == here
    up = grows == (here < budget)
    end = high if up else low
    ratio = budget / max(here, 1) if grows else max(here, 1) / budget
    inside, outside = start, _between(round(start * ratio), start + (1 if up else -1), end)
    while True:
        if (point := at(outside)) is None:
            outside = end = _edge(outside, inside, at)
            point = looked(outside)
        if (point.count >= budget) != (here >= budget):
            break
        if outside == end:
            return [end]
        inside, outside = outside, _between(outside * 4 if up else outside // 4, outside + (1 if up else -1), end)
    left, right = sorted((inside, outside))
    halve = False
    while right - left > 1:  # a straight line between the ends, and every other time the middle
        a, b = looked(left).count - budget, looked(right).count - budget
        middle = (left + right) // 2 if halve or a == b else round(left - a * (right - left) / (b - a))
        middle, halve = _between(middle, left + 1, right - 1), not halve
        if (looked(middle).count >= budget) == (looked(left).count >= budget):
            left = middle
        else:
            right = middle
    return [u for u in range(left - 1, right + 2) if low <= u <= high]


def _between(value: int, one: int, other: int) -> int:
    """`value`, held between two others."""
    return min(max(value, min(one, other)), max(one, other))


def _edge(outside: int, inside: int, at: Callable[[int], _Point | None]) -> int:
    """The value next to `outside`, on the side of `inside`, that still fits the layers."""
    while abs(outside - inside) > 1:
        middle = (outside + inside) // 2
        outside, inside = (outside, middle) if at(middle) else (middle, inside)
    return inside


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
