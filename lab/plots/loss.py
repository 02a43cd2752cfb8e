"""Training loss of several runs in one chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, colour, register, tint

POINTS = 240  # a curve is thinned to about this many points: a chart twice a second must stay light


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with the bias of its start corrected (as Adam's moments are).

    Diffusion losses depend mostly on the timestep drawn, so the raw curve hides the trend.
    """
    keep = 1 - 2 / (span + 1)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def thin(values: Sequence[Any], points: int = POINTS) -> list[Any]:
    """About `points` of the values at equal distances, the last one always among them."""
    stride = max(1, -(-len(values) // points))
    kept = list(values[::stride])
    return kept if not values or (len(values) - 1) % stride == 0 else [*kept, values[-1]]


def draw(records: Sequence[dict[str, Any]], *, steps: int | None = None) -> go.Figure:
    """`records`: [{"method", "name", "seed", "losses": [(step, loss), …]}, …], one a run.

    A method has one colour; its first seed is drawn solid, the others dashed. The faint line is the raw loss of
    the first seed, the strong one the moving average over a fifteenth of the steps.
    """
    fig = _style.figure("step", "training loss", height=320, hovermode="x unified")
    shown: dict[str, int] = {}
    for record in records:
        losses = [(s, v) for s, v in record["losses"] if v == v]
        if not losses:
            continue
        nth = shown.get(record["method"], 0)
        shown[record["method"]] = nth + 1
        xs, ys = [s for s, _ in losses], [v for _, v in losses]
        paint = colour(record["method"])
        if nth == 0:
            fig.add_scatter(
                x=thin(xs),
                y=thin(ys),
                mode="lines",
                line={"color": tint(paint, 0.22), "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
        fig.add_scatter(
            x=thin(xs),
            y=thin(smooth(ys, max(2, (steps or len(ys)) // 15))),
            mode="lines",
            name=f"{record['name']} · seed {record['seed']}",
            line={"color": paint, "width": 2.4, "dash": ("solid", "dash", "dot", "dashdot")[nth % 4]},
            hovertemplate="%{y:.4f}",
        )
    if not shown:
        return _style.note(fig, "The curves begin with the first training step.")
    fig.update_yaxes(rangemode="tozero")
    if steps:
        fig.update_xaxes(range=[0, steps])
    return fig


register(Plot("loss", "Training loss", draw, order=10))
