"""Validation accuracy while few-shot methods train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: [{"method", "name", "seed", "points": [(step, accuracy), …]}, …], one a run and learning rate."""
    fig = _style.figure("step", "validation accuracy", height=300, legend={"font": {"size": 11}})
    named: set[str] = set()
    for record in records:
        method = record["method"]
        fig.add_scatter(
            x=[step for step, _ in record["points"]],
            y=[accuracy for _, accuracy in record["points"]],
            name=record["name"],
            legendgroup=method,
            showlegend=method not in named,
            mode="lines+markers",
            marker={"size": 4},
            line={"color": colour(method), "width": 1.8},
            hovertemplate=f"{record['name']}, seed {record['seed']}, step %{{x}}: %{{y:.1%}}<extra></extra>",
        )
        named.add(method)
    if not records:
        return _style.note(fig, "Curves come when training begins.")
    return fig.update_yaxes(tickformat=".0%", rangemode="tozero").update_layout(
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
    )


register(Plot("fewshot-validation", "Validation accuracy while training", draw, order=62))
