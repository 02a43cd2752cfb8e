"""How well each layer's update was fitted, by method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: [{"method", "name", "layers": [{"layer", "norm", "relative_error"}, …]}, …], layers in the network's order."""
    fig = _style.figure("layer, in the network's order", "relative error", height=300)
    if not records:
        return _style.note(fig, "Errors come when a fit is done.")
    for record in records:
        layers = record["layers"]
        fig.add_scatter(
            x=list(range(1, len(layers) + 1)),
            y=[row["relative_error"] for row in layers],
            text=[f"{row['layer']}<br>‖ΔW‖ {row['norm']:.3g}" for row in layers],
            name=record["name"],
            mode="lines+markers",
            line={"color": colour(record["method"]), "width": 1},
            marker={"color": colour(record["method"]), "size": 6},
            hovertemplate="%{text}<br>relative error %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    return fig.update_yaxes(rangemode="tozero")


register(Plot("compress-layers", "Relative error of a compressed adapter by layer", draw, order=72))
