"""CLIP scores of methods with their spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lab.plots import Plot, _style, colour, register

SCORES = (("clip_i", "CLIP-I: like the subject"), ("clip_t", "CLIP-T: like the prompt"))


def draw(records: Sequence[dict[str, Any]]) -> go.Figure:
    """`records`: [{"method", "name", "clip_i", "clip_i_spread", "clip_t", "clip_t_spread"}, …], one a method.

    Points with error bars of one standard deviation over seeds; the axis does not start at zero, so no bars.
    """
    fig = make_subplots(rows=2, cols=1, subplot_titles=[title for _, title in SCORES], vertical_spacing=0.24)
    fig.update_layout(_style.figure(height=130 + 64 * max(2, len(records))).layout, showlegend=False)
    for row, (key, _) in enumerate(SCORES, start=1):
        for record in records:
            if record.get(key) is None:
                continue
            spread = record.get(f"{key}_spread")
            fig.add_scatter(
                x=[record[key]],
                y=[record["name"]],
                error_x={"type": "data", "array": [spread], "thickness": 2, "width": 6} if spread else None,
                mode="markers",
                marker={"color": colour(record["method"]), "size": 12},
                hovertemplate=f"{record['name']}: %{{x:.3f}}"
                + (f" ± {spread:.3f}" if spread else "")
                + "<extra></extra>",
                row=row,
                col=1,
            )
    line = {"gridcolor": _style.LINE, "zeroline": False, "automargin": True}
    fig.update_xaxes(**line, tickformat=".3~f", nticks=6).update_yaxes(**line, autorange="reversed")
    fig.update_annotations(font={"size": 13, "color": _style.INK})
    if not any(record.get(key) is not None for record in records for key, _ in SCORES):
        return _style.note(_style.figure(height=160), "Scores come when a run has finished.")
    return fig


register(Plot("scores", "Scores with their spread over seeds", draw, order=20))
