"""The singular values behind one measured point, with the tolerance that decides which of them count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register

KINDS = (
    ("spectrum", "samples (span)", "solid", "circle"),
    ("local_spectrum", "Jacobian (local dimension)", "dash", "diamond"),
    ("update_spectrum", "one update (rank)", "dot", "square"),
)
FLOOR = 1e-12  # what is below is rounding, drawn at this height


def draw(records: Sequence[dict[str, Any]], *, tolerance: float = 1e-6) -> go.Figure:
    """`records`: one measured point of lab.coverage, with its spectra."""
    fig = _style.figure("index (log)", "singular value / largest", height=340)
    for record in records:
        paint = colour(record["method"])
        for key, name, dash, symbol in KINDS:
            if not record.get(key):
                continue
            x = [i for i, _ in record[key]]
            fig.add_scatter(
                x=x,
                y=[max(v, FLOOR) for _, v in record[key]],
                name=name,
                mode="lines+markers" if len(x) < 80 else "lines",
                line={"color": paint, "width": 2, "dash": dash},
                marker={"color": paint, "size": 6, "symbol": symbol},
                hovertemplate=f"{name}: number %{{x}}, %{{y:.2g}}<extra></extra>",
            )
    if not records:
        return _style.note(fig, "Choose a point of a span, a dimension or a rank.")
    fig.add_hline(tolerance, line={"dash": "dash", "color": _style.INK, "width": 1.2})
    fig.add_annotation(  # by hand: plotly puts a line's own label in the wrong place on a log axis
        text=f"tolerance {tolerance:.0e}", x=1, xref="paper", xanchor="right", y=math.log10(tolerance), yanchor="bottom",
        showarrow=False, font={"size": 12},
    )  # fmt: skip
    ticks = [m * 10**p for p in range(5) for m in (1, 2, 5)]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks])
    fig.update_yaxes(type="log", dtick=2, exponentformat="power", range=[-12.4, 0.6])
    fig.update_layout(margin={"t": 64})
    return fig


register(Plot("coverage-spectrum", "Singular values of a point", draw, order=71))
