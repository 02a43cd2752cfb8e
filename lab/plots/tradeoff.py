"""What a method's parameters buy: trainable parameters against a score."""

from __future__ import annotations

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
    fig.update_xaxes(type="log", range=[_log10(low) - 0.25, _log10(high) + 0.45], dtick=1 if high / low > 30 else None)
    for record in records:
        if record["method"] == "base" and record.get(score) is not None:
            fig.add_hline(
                record[score], line={"dash": "dot", "color": colour("base")}, annotation={"text": "base model"}
            )
    return fig


def _log10(value: float) -> float:
    import math

    return math.log10(value)


register(Plot("tradeoff", "Parameters against score", draw, order=30))
