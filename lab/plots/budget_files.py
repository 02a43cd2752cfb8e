"""File sizes by precision, every method beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def figure(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figure as plain data. `records`: {"method", "name", "bytes": {precision: bytes}}."""
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": record["name"],
            "x": list(record["bytes"].values()),
            "y": list(record["bytes"]),
            "line": {"color": colour(record["method"]), "width": 2},
            "marker": {"size": 9},
            "hovertemplate": f"{record['name']}, %{{y}}: %{{x:.3s}}B<extra></extra>",
        }
        for record in records
    ]
    layout = _style.layout("file size in bytes (log)", "", height=320)
    layout["xaxis"] |= {"type": "log", "dtick": 1, "tickformat": "~s"}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed"}
    return {"data": data, "layout": layout}


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`figure` as a plotly Figure."""
    return go.Figure(figure(records))


register(Plot("budget-files", "File sizes", draw, order=52))
