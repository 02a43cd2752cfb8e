"""Overlap of every two of several adapters."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, register
from lab.plots.xray_map import DIVERGING, SCALE, VALUES


def draw(records: Sequence[dict[str, Any]], *, names: Sequence[str] = (), show: str = "outputs") -> go.Figure:
    """`records`: the pairs of lab.xray.report.compare, `names` its names; `show`: outputs, inputs or cosine."""
    fig = _style.figure(height=max(260, 150 + 44 * len(names)))
    if not records:
        return _style.note(fig, "Choose adapters to compare with.")
    labels = [html.escape(f"{i + 1}. {n if len(n) <= 34 else n[:33] + '…'}") for i, n in enumerate(names)]
    cells = [[1.0 if i == j else 0.0 for j in range(len(names))] for i in range(len(names))]
    for pair in records:
        cells[pair["a"]][pair["b"]] = cells[pair["b"]][pair["a"]] = pair[show]
    name, form = VALUES[show]
    signed = show == "cosine"
    fig.add_heatmap(
        z=cells, x=[str(i + 1) for i in range(len(names))], y=labels, zmin=-1 if signed else 0, zmax=1,
        colorscale=DIVERGING if signed else SCALE, xgap=2, ygap=2, showscale=False, texttemplate=f"%{{z:{form}}}",
        hovertemplate=f"%{{y}} and %{{x}}: {name} %{{z:{form}}}<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(type="category", showgrid=False, side="top")
    fig.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return fig.update_layout(margin={"t": 40, "l": 20, "r": 10, "b": 16})


register(Plot("xray-overlap", "Overlap of adapters", draw, order=83))
