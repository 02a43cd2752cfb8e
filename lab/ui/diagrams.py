"""A small drawing of what a method freezes and what it trains, made from its registry row."""

from __future__ import annotations

from dataclasses import dataclass

from lab.methods import Method
from lab.plots import colour
from lab.ui.html import e

SIDE = 84  # of W in the drawing
THIN = 20  # width of a low-rank factor


@dataclass(frozen=True)
class Box:
    """One factor: `wide` and `high` in pixels; what fills it says whether it is trained."""

    label: str
    wide: int
    high: int
    trained: bool
    fill: str = "plain"  # plain, diagonal, dots, wave


def boxes(method: Method) -> list[Box | str]:
    """The boxes and the signs between them, from left to right, after W."""
    tall, flat, small = (THIN, SIDE), (SIDE, THIN), (34, 34)
    if method.kind == "bias":
        return ["+", Box("b", 8, SIDE, True)]
    if method.kind == "multiplicative":
        return ["×", Box("R", SIDE, SIDE, True, "diagonal")]
    if method.kind == "sparse":
        return ["+", Box("ΔW", SIDE, SIDE, True, "dots")]
    if method.kind == "frequency":
        return ["+", Box("ΔW", SIDE, SIDE, True, "wave")]
    frozen = method.equation.count(r"\text{frozen}")
    first = method.equation.find(r"\text{frozen}") < len(method.equation) / 2
    if frozen >= 2:
        return ["+", Box("frozen", *tall, False), Box("trained", *small, True), Box("frozen", *flat, False)]
    if frozen == 1 and first:
        return ["+", Box("frozen", *tall, False), Box("trained", *flat, True)]
    if frozen == 1:
        return ["+", Box("trained", *tall, True), Box("frozen", *flat, False)]
    if method.low_rank:
        return ["+", Box("B", *tall, True), Box("A", *flat, True)]
    return ["+", Box("ΔW", SIDE, SIDE, True, "dots")]


def diagram(method: Method) -> str:
    """An SVG: grey and dashed is frozen, the method's colour is trained. Labels take the page's text colour."""
    paint, x, top = colour(method.id), 2, 4
    parts = [_box(Box("W", SIDE, SIDE, False), x, top, paint)]
    x += SIDE
    for part in boxes(method):
        if isinstance(part, str):
            parts.append(
                f'<text x="{x + 16}" y="{top + SIDE / 2 + 7}" text-anchor="middle" font-size="20">{part}</text>'
            )
            x += 32
            continue
        parts.append(_box(part, x, top + (SIDE - part.high) // 2 if part.wide < SIDE else top, paint))
        x += part.wide + 6
    told = f"{method.name}: what is frozen and what is trained"
    return (
        f'<svg class="diagram" viewBox="0 0 {x + 2} {SIDE + 28}" width="{x + 2}" role="img" aria-label="{e(told)}" '
        f'fill="currentColor" font-size="11">{"".join(parts)}</svg>'
    )


def _box(box: Box, x: int, y: int, paint: str) -> str:
    look = f'fill="{paint}" fill-opacity=".22" stroke="{paint}" stroke-width="2"'
    if not box.trained:
        look = 'fill="currentColor" fill-opacity=".06" stroke="currentColor" stroke-opacity=".5" stroke-width="1.5" stroke-dasharray="4 3"'
    inside = _inside(box, x, y, paint)
    if inside:
        look = look.replace('fill-opacity=".22"', 'fill-opacity=".06"')
    label = f'<text x="{x + box.wide / 2}" y="{y + box.high + 15}" text-anchor="middle">{e(box.label)}</text>'
    return f'<rect x="{x}" y="{y}" width="{box.wide}" height="{box.high}" rx="4" {look}/>{inside}{label}'


def _inside(box: Box, x: int, y: int, paint: str) -> str:
    cell = 12
    if box.fill == "dots":  # entries that are trained, or made from few trained numbers
        return "".join(
            f'<rect x="{x + 3 + cell * (i % 6) + 4}" y="{y + 3 + cell * (i // 6) + 4}" width="7" height="7" rx="2" fill="{paint}"/>'
            for i in (2, 4, 7, 9, 12, 17, 19, 21, 26, 28, 30, 35)
        )
    if box.fill == "diagonal":
        return "".join(
            f'<rect x="{x + 5 + i * 19}" y="{y + 5 + i * 19}" width="17" height="17" rx="3" fill="{paint}" fill-opacity=".7"/>'
            for i in range(4)
        )
    if box.fill == "wave":
        lines = (f"M{x + 6} {y + 20 + 22 * i} q 9 {-14 + 4 * i} 18 0 t 18 0 t 18 0 t 18 0" for i in range(3))
        return "".join(f'<path d="{d}" fill="none" stroke="{paint}" stroke-width="2"/>' for d in lines)
    return ""
