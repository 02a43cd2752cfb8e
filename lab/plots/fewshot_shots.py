"""Few-shot accuracy against the number of shots, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: [{"method", "name", "shots", "mean", "spread"}, …]."""
    fig = _style.figure("training pictures a class", "test accuracy", height=360, legend={"font": {"size": 11}})
    for method in dict.fromkeys(r["method"] for r in records):
        own = sorted((r for r in records if r["method"] == method), key=lambda r: r["shots"])
        fig.add_scatter(
            x=[r["shots"] for r in own],
            y=[r["mean"] for r in own],
            error_y={"type": "data", "array": [r["spread"] or 0 for r in own], "thickness": 1.5, "width": 4},
            name=own[0]["name"],
            mode="lines+markers",
            line={"color": colour(method), "width": 2},
            hovertemplate=f"{own[0]['name']}, %{{x}} shots: %{{y:.1%}}<extra></extra>",
        )
    if not records:
        return _style.note(fig, "Lines come when a run has finished.")
    shots = sorted({r["shots"] for r in records})
    fig.update_xaxes(type="log", tickvals=shots, ticktext=[str(k) for k in shots])
    return fig.update_yaxes(tickformat=".0%").update_layout(
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
    )


register(Plot("fewshot-shots", "Few-shot accuracy against shots", draw, order=61))
