"""A small drawing of what a method freezes and what it trains: one box a tensor, from its registry row."""

from __future__ import annotations

from dataclasses import dataclass

from lab.methods import Method
from lab.plots import colour
from lab.ui.html import e

SIDE = 84  # of W, and of whatever is as long as a side of W
SOME, THIN = 40, 20  # of a side divided into blocks, and of one that has nothing to do with W's
WIDEST = 505  # of a line of boxes: NoRA's five
LINE = SIDE + 40  # its height with the two lines of text below


@dataclass(frozen=True)
class Box:
    """One tensor: `wide` and `high` in pixels, `many` where it is a family of them."""

    name: str
    shape: str
    wide: int
    high: int
    trained: bool
    many: bool = False

    @property
    def room(self) -> int:
        """Pixels that the box and its labels take."""
        return max(self.wide + 8 * self.many, 7 * len(self.name), int(5.6 * len(self.shape)), 14) + 12


def boxes(method: Method) -> list[Box]:
    """W, then the factors of the update in their order; else what is trained, then what else is frozen."""
    frozen = {name: shape for name, shape in method.tensors["frozen"].items() if name != "W"}
    parts = [_sized(n, s, True) for n, s in method.tensors["trained"].items()]
    parts += [_sized(n, s, False) for n, s in frozen.items()]
    if order := method.product:
        parts.sort(key=lambda box: order.index(box.name) if box.name in order else len(order))
    return [Box("W", "m × n", SIDE, SIDE, False), *parts]


def _sized(name: str, shape: str, trained: bool) -> Box:
    """The box for a shape such as "m × r", "k", "k of r × n, from the seed"."""
    plain = shape.split(",")[0]
    family, _, each = plain.rpartition(" of ")
    sides = [s.strip() for s in (each or plain).split("×")]
    if len(sides) == 1:  # a vector, drawn upright
        return Box(name, plain, 10, 12 if sides[0] == "1" else _long(sides[0]), trained)
    many = bool(family) or len(sides) > 2
    return Box(name, plain, _long(sides[-1]), _long(sides[-2]), trained, many)


def _long(side: str) -> int:
    bare = side.removeprefix("max ").removeprefix("each ")
    if "/" in bare:
        return SOME
    return SIDE if bare in ("m", "n", "min(m, n)", "c_out", "c_in", "p", "(p−k)") else THIN


def diagram(method: Method) -> str:
    """An SVG: grey and dashed is frozen, the method's colour is trained. Labels take the page's text colour."""
    paint, x, line, widest, parts = colour(method.id), 4, 0, 0, []
    for i, box in enumerate(boxes(method)):
        if x > 4 and x + box.room > WIDEST:
            x, line = 4, line + 1
        parts.append(_drawn(box, x, 8 + line * LINE, paint))
        x += box.room
        if i == 0:
            sign = "×" if method.kind == "multiplicative" else "+"
            parts.append(f'<text x="{x + 4}" y="{SIDE / 2 + 14}" text-anchor="middle" font-size="20">{sign}</text>')
            x += 20
        widest = max(widest, x)
    told = f"{method.name}: what is frozen and what is trained"
    return (
        f'<svg class="diagram" viewBox="0 0 {widest} {(line + 1) * LINE + 4}" width="{widest}" role="img"'
        f' aria-label="{e(told)}" fill="currentColor" font-size="11">{"".join(parts)}</svg>'
    )


def _drawn(box: Box, x: int, top: int, paint: str) -> str:
    look = f'fill="{paint}" fill-opacity=".22" stroke="{paint}" stroke-width="2"'
    if not box.trained:
        look = (
            'fill="currentColor" fill-opacity=".06" stroke="currentColor" stroke-opacity=".5" stroke-width="1.5"'
            ' stroke-dasharray="4 3"'
        )
    left, y = x + (box.room - 12 - box.wide) // 2, top + (SIDE - box.high) // 2
    steps = (8, 4, 0) if box.many else (0,)
    rects = "".join(
        f'<rect x="{left + s}" y="{y - s}" width="{box.wide}" height="{box.high}" rx="3" {look}/>' for s in steps
    )
    middle = x + (box.room - 12) / 2
    return (
        f'{rects}<text x="{middle}" y="{top + SIDE + 15}" text-anchor="middle">{e(box.name)}</text>'
        f'<text x="{middle}" y="{top + SIDE + 28}" text-anchor="middle" font-size="10" fill-opacity=".65">{e(box.shape)}</text>'
    )
