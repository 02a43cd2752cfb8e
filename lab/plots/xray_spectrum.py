"""Singular values of a layer's update, of one adapter or several."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, register


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: {"name", "spectrum": [[number, σ], …], "effective_rank"}, one line each."""
    fig = _style.figure("number", "singular value (log)", height=320)
    drawn = [r for r in records if r["spectrum"]]
    if not drawn:
        return _style.note(fig, "Choose a layer that changes.")
    for record in drawn:
        x = [i for i, _ in record["spectrum"]]
        fig.add_scatter(
            x=x,
            y=[v for _, v in record["spectrum"]],
            name=html.escape(record["name"]),
            mode="lines+markers" if len(x) < 70 else "lines",
            marker={"size": 6},
            hovertemplate="number %{x}: σ = %{y:.4g}<extra></extra>",
        )
    top = max(r["spectrum"][-1][0] for r in drawn)
    if len(drawn) == 1:
        fig.add_vline(drawn[0]["effective_rank"], line={"dash": "dash", "color": _style.INK, "width": 1.2})
        fig.add_annotation(
            text=f"effective rank {drawn[0]['effective_rank']:.1f}", x=drawn[0]["effective_rank"], y=1, yref="paper",
            yanchor="bottom", showarrow=False, font={"size": 12},
        )  # fmt: skip
    fig.update_xaxes(range=[0.5, top + 0.5], dtick=1 if top <= 12 else None)
    return fig.update_yaxes(type="log", exponentformat="power", nticks=6).update_layout(showlegend=len(drawn) > 1)


register(Plot("xray-spectrum", "Spectrum of a layer", draw, order=81))
