"""What a method's parameters buy: trainable parameters against a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register

NAMES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T"}


def draw(records: Sequence[dict[str, Any]], *, score: str = "clip_i") -> go.Figure:
    """`records` as for the scores plot, with "trainable_parameters". The untouched base is a dotted line."""
    fig = _style.figure("trainable parameters (log)", NAMES.get(score, score), height=300, showlegend=False)
    points = [r for r in records if r.get("trainable_parameters") and r.get(score) is not None]
    for record in points:
        spread = record.get(f"{score}_spread")
        fig.add_scatter(
            x=[record["trainable_parameters"]],
            y=[record[score]],
            error_y={"type": "data", "array": [spread], "thickness": 2, "width": 6} if spread else None,
            mode="markers+text",
            text=[record["name"]],
            textposition="middle right",
            marker={"color": colour(record["method"]), "size": 13},
            hovertemplate=f"{record['name']}: %{{x:,}} parameters, %{{y:.3f}}<extra></extra>",
        )
    if not points:
        return _style.note(fig, "Points come when a run has finished.")
    low, high = (f(r["trainable_parameters"] for r in points) for f in (min, max))
    ticks = _ticks(low / 1.8, high * 2.6)
    fig.update_xaxes(
        type="log",
        range=[math.log10(low / 1.8), math.log10(high * 2.6)],
        tickvals=ticks,
        ticktext=[_short(tick) for tick in ticks],
    )
    for record in records:
        if record["method"] == "base" and record.get(score) is not None:
            fig.add_hline(
                record[score], line={"dash": "dot", "color": colour("base")}, annotation={"text": "base model"}
            )
    return fig


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in the range; powers alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return fine if len(fine) <= 7 else [10.0**p for p in powers if low <= 10.0**p <= high]


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


register(Plot("tradeoff", "Parameters against score", draw, order=30))
