"""The search behind `lab.budget.solve`: settings of a method by their count. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.budget import MAX_BUDGET, SAME, check, count, knob_fields, known
from lab.errors import LabError
from lab.methods.spec import Layer, Method


@dataclass(frozen=True)
class Point:
    knobs: Any
    count: int


class Search:
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
        self.seen: dict[tuple[int, ...], Point | None] = {}
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

    def at(self, address: tuple[int, ...]) -> Point | None:
        """The point at an address; None where the settings do not fit."""
        if address not in self.seen:
            values = {f.name: u / 10_000 if self._fraction(f) else u for f, u in zip(self.turned, address, strict=True)}
            try:
                knobs = dataclasses.replace(self.start, **values)
                check(self.method, self.layers, knobs)
                self.seen[address] = Point(knobs, count(self.method, self.layers, knobs))
            except LabError as error:
                self.errors.append(error)
                self.seen[address] = None
        return self.seen[address]

    # -- one knob ------------------------------------------------------------------------------------------
    def _along(self, i: int, address: tuple[int, ...], budget: int) -> list[Point]:
        """Points on both sides of the budget when knob i alone is turned from `address`."""

        def at(u: int) -> Point | None:
            return self.at((*address[:i], u, *address[i + 1 :]))

        low, high = self._low(self.turned[i]), self._high(self.turned[i])
        if not self._is_range(i):
            near = range(low, min(high, 512) + 1)
            tried = sorted({*near, *(d for d in divisors(self.layers) if low <= d <= high), address[i]})
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
        facts, key = known(self.layers).facts, (self.method.id, self.names[i], others)
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
    def nearest(self, budget: int) -> Point:
        """The point whose count is nearest to the budget. Raises LabError when nothing fits."""
        found: list[Point] = []
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

    def _refined(self, point: Point, budget: int) -> list[Point]:
        """Neighbours of the best point in each knob, with the others searched along."""
        centre = self._of(point)
        if abs(point.count - budget) <= self.same * budget:
            return []
        found: list[Point] = []
        for i in range(len(centre)):
            for step in (-2, -1, 1, 2):
                moved = (*centre[:i], max(self._low(self.turned[i]), centre[i] + step), *centre[i + 1 :])
                for j in range(len(centre)):
                    if j != i:
                        found += self._along(j, moved, budget)
        return found

    def _of(self, point: Point) -> tuple[int, ...]:
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

    def _order(self, point: Point, budget: int) -> tuple[float, float, int]:
        miss = abs(point.count - budget)
        moved = [abs(math.log(u / o)) for u, o in zip(self._of(point), self.origin, strict=True)]
        far = max(moved) + 0.1 * sum(moved)  # all knobs together rather than one far
        return (0.0 if miss <= self.same * budget else float(miss), round(far, 6), miss)

    def passes(self, budget: int) -> bool:
        """Whether counts on both sides of the budget were seen: it lies between the floor and the ceiling."""
        counts = [p.count for p in self.seen.values() if p]
        return min(counts) <= budget <= max(counts)

    def extreme(self, *, low: bool) -> Point:
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


def divisors(layers: Sequence[Layer]) -> list[int]:
    """Divisors of the layers' sides, which are the only block sizes that some methods take."""
    sides = {side for layer, _ in known(layers).shapes for side in (layer.m, layer.n)}
    return sorted(
        {d for side in sides for i in range(1, math.isqrt(side) + 1) if side % i == 0 for d in (i, side // i)}
    )


def _crossing(start: int, low: int, high: int, at: Callable[[int], Point | None], budget: int) -> list[int]:
    """Values next to where the count crosses the budget, looked for from `start`, which fits; where it does not cross
    it, the last value that fits on that side. Counts nearly proportional to the value take a handful of looks."""

    def looked(u: int) -> Point:
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


def _edge(outside: int, inside: int, at: Callable[[int], Point | None]) -> int:
    """The value next to `outside`, on the side of `inside`, that still fits the layers."""
    while abs(outside - inside) > 1:
        middle = (outside + inside) // 2
        outside, inside = (outside, middle) if at(middle) else (middle, inside)
    return inside
