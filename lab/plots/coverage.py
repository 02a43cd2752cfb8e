"""What updates methods reach against their parameters: closed forms as lines, measurements as points on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register

AXES = {
    "coverage": "span of updates / d²",
    "local": "local dimension (rank of the Jacobian)",
    "rank": "rank of one update",
    "error": "relative error of the best fit",
}


def draw(records: Sequence[dict[str, Any]], *, what: str = "coverage", log: bool = False, d: int = 0) -> go.Figure:
    """`records`: {"method", "name", "line": [[n, y], …], "points": [[n, y, hover text], …]}; `what` one of AXES.

    With d the largest possible value is a dotted line: 1, d² or d.
    """
    fig = _style.figure("trainable parameters" + (" (log)" if log else ""), AXES[what], height=440)
    for place, record in enumerate(records):
        # Curves often lie on each other (a span of one): earlier ones are wider, so that all of them show.
        behind = len(records) - 1 - place
        paint = colour(record["method"])
        shared = {"name": record["name"], "legendgroup": record["method"]}
        if record["line"]:
            x, y = zip(*record["line"], strict=True)
            fig.add_scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": paint, "width": 2 + 1.2 * min(behind, 6)},
                showlegend=False,
                hoverinfo="skip",
                **shared,
            )
        x, y, text = zip(*record["points"], strict=True) if record["points"] else ((None,), (None,), ("",))
        fig.add_scatter(
            x=x,
            y=y,
            text=text,
            mode="lines+markers" if what == "error" else "markers",
            line={"color": paint, "width": 2},
            marker={
                "color": paint,
                "size": 8 if what == "error" else 7 + 2 * min(behind, 6),
            },
            hovertemplate="%{text}<extra></extra>",
            **shared,
        )
    top = {"coverage": 1, "local": d * d, "rank": d}.get(what, 0)
    if top:
        name = {"coverage": "everything", "local": "d²", "rank": "d"}[what]
        fig.add_hline(
            top,
            line={"dash": "dot", "color": _style.INK, "width": 1.2},
            annotation={"text": name, "font": {"size": 12}},
            annotation_position="top left",
        )
        fig.update_yaxes(range=[-0.03 * top, 1.1 * top])
    if what == "error":
        fig.update_yaxes(range=[-0.03, 1.06])
    if log:
        ticks = [m * 10**p for p in range(6) for m in (1, 2, 5)]
        fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks])
    else:
        fig.update_xaxes(rangemode="tozero")
    fig.update_layout(hovermode="closest", margin={"t": 64}, legend_itemsizing="constant")
    return fig if records else _style.note(fig, "Choose a method.")


register(Plot("coverage", "Reachable updates against parameters", draw, order=70))
