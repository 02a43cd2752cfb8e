"""Few-shot accuracy against trainable parameters, one point a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: [{"method", "name", "parameters", "mean", "spread"}, …]; methods without parameters are dotted lines."""
    fig = _style.figure("trainable parameters (log)", "test accuracy", height=360, showlegend=False)
    points = [r for r in records if r["parameters"]]
    if not records:
        return _style.note(fig, "Points come when a run has finished.")
    for r in points:
        fig.add_scatter(
            x=[r["parameters"]],
            y=[r["mean"]],
            error_y={"type": "data", "array": [r["spread"]], "thickness": 1.5, "width": 4} if r["spread"] else None,
            mode="markers+text",
            text=[r["name"]],
            textposition="top center",
            textfont={"size": 11},
            marker={"color": colour(r["method"]), "size": 11},
            hovertemplate=f"{r['name']}: %{{x:,}} parameters, %{{y:.1%}}<extra></extra>",
        )
    for r in records:
        if not r["parameters"]:
            fig.add_hline(
                r["mean"],
                line={"dash": "dot", "width": 1.5, "color": colour(r["method"])},
                annotation={"text": r["name"], "font": {"size": 11}},
            )
    fig.update_xaxes(type="log", dtick=1 if points else None)
    return fig.update_yaxes(tickformat=".0%")


register(Plot("fewshot-parameters", "Few-shot accuracy against parameters", draw, order=60))
