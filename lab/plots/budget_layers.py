"""Parameters by block of layers, every method beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def figure(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figure as plain data. `records`: {"method", "name", "blocks": [label, …], "counts": [parameters, …]}.

    Up to twelve blocks are bars, more are lines.
    """
    many = any(len(record["blocks"]) > 12 for record in records)
    data: list[dict[str, Any]] = []
    for record in records:
        trace: dict[str, Any] = {
            "name": record["name"],
            "x": record["blocks"],
            "y": [n or None for n in record["counts"]],
            "hovertemplate": f"{record['name']}, %{{x}}: %{{y:,}}<extra></extra>",
        }
        if many:
            trace |= {"type": "scatter", "mode": "lines", "line": {"color": colour(record["method"]), "shape": "hvh"}}
        else:
            trace |= {"type": "bar", "marker": {"color": colour(record["method"])}}
        data.append(trace)
    layout = _style.layout("", "parameters (log)", height=320)
    layout |= {"barmode": "group", "bargap": 0.22, "bargroupgap": 0.04}
    layout["xaxis"] |= {"type": "category", "nticks": 16}
    layout["yaxis"] |= {"type": "log", "dtick": 1, "tickformat": "~s"}
    return {"data": data, "layout": layout}


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`figure` as a plotly Figure."""
    return go.Figure(figure(records))


register(Plot("budget-layers", "Parameters by layer", draw, order=51))
