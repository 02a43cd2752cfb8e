"""Parameters against rank for every method, on log axes, with the chosen setting and LoRA's smallest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def figure(records: Sequence[dict[str, Any]], *, floor: int = 0) -> dict[str, Any]:
    """The figure as plain data. `records`: {"method", "name", "knob", "points": [[x, count], …], "chosen": [x, count]}.

    `floor` is the count of LoRA at rank 1, drawn as a dashed line.
    """
    data: list[dict[str, Any]] = []
    for record in records:
        paint = colour(record["method"])
        label = record["name"] if record["knob"] in ("r", "rank") else f"{record['name']} ({record['knob']})"
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label,
                "x": [x for x, _ in record["points"]],
                "y": [y for _, y in record["points"]],
                "line": {"color": paint, "width": 2},
                "legendgroup": record["method"],
                "hovertemplate": f"{record['name']}, {record['knob']} = %{{x:,}}: %{{y:,}}<extra></extra>",
            }
        )
        x, y = record["chosen"]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x],
                "y": [y],
                "showlegend": False,
                "legendgroup": record["method"],
                "marker": {"color": paint, "size": 12, "line": {"color": "rgba(255,255,255,.85)", "width": 1.5}},
                "hovertemplate": f"{record['name']}, chosen: %{{y:,}}<extra></extra>",
            }
        )
    layout = _style.layout("rank, or the method's size (log)", "trainable parameters (log)", height=360)
    layout["xaxis"] |= {"type": "log", "dtick": "D2"}
    layout["yaxis"] |= {"type": "log", "dtick": 1, "tickformat": "~s"}
    if floor:
        line = {"color": colour("lora"), "width": 1.5, "dash": "dash"}
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": floor,
                "y1": floor,
                "line": line,
                "layer": "below",
            }
        ]
        layout["annotations"] = [
            {
                "text": f"LoRA cannot go below {floor:,} (rank 1)",
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": _log10(floor),
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12, "color": _style.INK},
            }
        ]
    return {"data": data, "layout": layout}


def _log10(value: float) -> float:
    import math

    return math.log10(value)


def draw(records: Sequence[dict[str, Any]], *, floor: int = 0) -> go.Figure:
    """`figure` as a plotly Figure."""
    return go.Figure(figure(records, floor=floor))


register(Plot("budget-curve", "Parameters against rank", draw, order=50))
