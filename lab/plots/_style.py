"""What every figure of the lab has in common."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

INK = "#74807d"  # reads on the light and on the dark page, where the style sheet does not reach (exported images)
LINE = "rgba(128,140,137,.22)"
FONT = "IBM Plex Sans, ui-sans-serif, system-ui, sans-serif"


def figure(x: str = "", y: str = "", *, height: int = 320, **layout: Any) -> go.Figure:
    """An empty figure in the lab's style with axis titles `x` and `y`."""
    return go.Figure(layout=_base(x, y, height)).update_layout(**layout)


def layout(x: str = "", y: str = "", *, height: int = 320) -> dict[str, Any]:
    """The layout of `figure` as plain data, for figures that are sent without being checked by plotly."""
    return _base(x, y, height)


def _base(x: str, y: str, height: int) -> dict[str, Any]:
    axis = {"gridcolor": LINE, "zeroline": False, "linecolor": LINE, "ticks": "", "automargin": True}
    # The margin above leaves room for the legend and for the label that Gradio lays over the corner.
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13, "color": INK},
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 44, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": None},
        "hoverlabel": {"font": {"family": FONT, "size": 13}},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
        "colorway": ["#0f9d8c", "#d9822b", "#7a6ff0", "#d1508f"],
    }


def note(fig: go.Figure, text: str) -> go.Figure:
    """A sentence in the middle of a figure that has nothing to show yet."""
    fig.add_annotation(text=text, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"color": INK})
    return fig.update_layout(xaxis_visible=False, yaxis_visible=False)
