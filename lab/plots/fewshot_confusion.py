"""A few-shot run's confusion matrix: which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, register

LABELLED = 40  # classes up to which each row and column has its name


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: [{"classes": […], "confusion": [[count, …], …] | None}]: rows are truths, columns predictions."""
    fig = _style.figure("predicted", "truth", height=460, showlegend=False)
    if not records:
        return _style.note(fig, "The matrix comes when a run has finished.")
    if records[0]["confusion"] is None:
        return _style.note(fig, "A matrix is drawn for up to 200 classes.")
    names, counts = records[0]["classes"], records[0]["confusion"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    many = len(names) > LABELLED
    fig.add_heatmap(
        z=shares,
        customdata=counts,
        colorscale=[[0, "rgba(15,157,140,0.03)"], [1, "rgba(15,157,140,1)"]],
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=0 if many else 1,
        ygap=0 if many else 1,
        hovertemplate="class %{y} taken for %{x}: %{customdata} pictures (%{z:.0%})<extra></extra>",
    )
    ticks = {"showticklabels": not many, "tickvals": list(range(len(names))), "ticktext": [_plain(n) for n in names]}
    fig.update_xaxes(**ticks, tickangle=45, showgrid=False)
    return fig.update_yaxes(**ticks, autorange="reversed", showgrid=False)


def _plain(name: str) -> str:
    """A class name as plotly shows text: it reads a few HTML tags in labels, a class name is to be none."""
    short = name if len(name) <= 24 else f"{name[:23]}…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


register(Plot("fewshot-confusion", "Confusion matrix", draw, order=63))
