"""Plots: plain records in, a plotly Figure out. ADD A PLOT: one file here that registers a `Plot`.

Figures have a transparent background and grey text that reads on both page colours; the page's style sheet
recolours text and grid lines to the theme's. `colour(method_id)` is a method's colour everywhere in the lab.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.registry import Registry

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Plot:
    """A plot by name: `draw(records, **options)` with records a list of plain dicts."""

    id: str
    title: str
    draw: Callable[..., go.Figure]
    order: int = 100


PLOTS: Registry[Plot] = Registry("plot", "lab.plots")
register = PLOTS.register

# Chosen by hand for the methods seen most: apart from each other in hue and in lightness, at least 3:1 against
# the light (#fbfaf7) and the dark (#101615) page, and still apart with red-green colour blindness.
_CHOSEN = {
    "base": "#7d8886",
    "lora": "#d9822b",
    "nora": "#0f9d8c",
    "nola": "#7a6ff0",
    "pranc": "#d1508f",
    "dora": "#b8860b",
    "adalora": "#3d8fd1",
    "vera": "#6a994e",
    "lokr": "#c8553d",
    "loha": "#9a6fb0",
}


def colour(method: str) -> str:
    """The colour of a method (a registry id, or "base"), as "#rrggbb": the same on every page, plot and report.

    Ids without a colour of their own get one from their name alone, so that it never depends on what else is
    registered.
    """
    if method in _CHOSEN:
        return _CHOSEN[method]
    digest = zlib.crc32(method.encode())
    return _oklch(0.62 + 0.06 * ((digest >> 12) % 3 - 1), 0.13, digest % 360)


def tint(colour: str, alpha: float) -> str:
    """The colour at this opacity, as plotly and CSS write it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """OKLCH to sRGB (Ottosson 2020, https://bottosson.github.io/posts/oklab), clipped to the gamut."""
    import math

    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    l_, m_, s_ = (
        (lightness + x * a + y * b) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    linear = (
        4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
        -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
        -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
    )
    encoded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (max(0.0, x) for x in linear))
    return "#" + "".join(f"{min(255, round(255 * c)):02x}" for c in encoded)
