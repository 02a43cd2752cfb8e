"""How much of a layer's update lies in the k leading singular directions of the base's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, register

SIDES = ((1, "outputs, U_kᵀΔW", "#0f9d8c"), (2, "inputs, ΔW·V_k", "#d9822b"))


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: one layer of lab.xray.report, measured against the base."""
    fig = _style.figure("k, leading directions of W", "share of ‖ΔW‖²", height=320)
    found = next((r for r in records if r.get("subspace")), None)
    if found is None:
        return _style.note(fig, "Not measured for this layer.")
    curve, chance = found["subspace"]["curve"], found["subspace"]["chance"]
    for at, name, paint in SIDES:
        fig.add_scatter(
            x=[point[0] for point in curve],
            y=[point[at] for point in curve],
            name=name,
            mode="lines+markers",
            line={"color": paint, "width": 2},
            hovertemplate=f"{name}: k = %{{x}}, %{{y:.1%}}<extra></extra>",
        )
    k, last = found["subspace"]["k"], curve[-1][0]
    for side, paint in (("outputs", "#0f9d8c"), ("inputs", "#d9822b")):
        fig.add_scatter(
            x=[0, last], y=[0, last * chance[side] / k], mode="lines", line={"dash": "dot", "color": paint, "width": 1.2},
            name="a random ΔW", showlegend=side == "outputs", hoverinfo="skip",
        )  # fmt: skip
    fig.update_yaxes(range=[0, 1.03], tickformat=".0%")
    return fig.update_layout(margin={"t": 64})


register(Plot("xray-subspace", "In the base's directions", draw, order=82))
