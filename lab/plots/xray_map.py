"""A network as a map: blocks from left to right, projections from top to bottom, coloured by one number a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lab.plots import Plot, _style, register
from lab.xray.places import rank_of

# key in a layer's record → what it is called, and how it is written
VALUES = {
    "norm": ("‖ΔW‖", ".3g"),
    "effective_rank": ("effective rank", ".2f"),
    "energy": ("share of energy", ".2%"),
    "stable_rank": ("stable rank", ".2f"),
    "top": ("share in W's top tenth", ".1%"),
    "intruders": ("intruders of 10", ".0f"),
    "outputs": ("φ, outputs", ".3f"),
    "inputs": ("φ, inputs", ".3f"),
    "cosine": ("cosine", "+.3f"),
}
SCALE = [[0.0, "rgba(15,157,140,0.05)"], [0.5, "rgba(15,157,140,0.55)"], [1.0, "#0f9d8c"]]
DIVERGING = [[0.0, "#d1508f"], [0.5, "rgba(128,140,137,0.12)"], [1.0, "#0f9d8c"]]


def value(record: dict[str, Any], key: str) -> float | None:
    """A layer's number by the map's name for it, None where it was not measured."""
    if key == "top":
        return record["subspace"]["outputs"] if record.get("subspace") else None
    found = record.get(key)
    return found["intruders"] if isinstance(found, dict) else found


def draw(records: Sequence[dict[str, Any]], *, show: str = "norm") -> go.Figure:
    """`records`: layers of lab.xray.report in the network's order, or of one pair of its overlap; `show`: one of VALUES."""
    name, form = VALUES[show]
    blocks = list(dict.fromkeys(r["block"] for r in records))
    projections = sorted({r["projection"] for r in records}, key=rank_of)
    fig = _style.figure(height=max(230, 120 + 25 * len(projections)))
    if not records:
        return _style.note(fig, "Nothing to map yet.")
    cells: list[list[float | None]] = [[None] * len(blocks) for _ in projections]
    said = [[""] * len(blocks) for _ in projections]
    row, column = {p: i for i, p in enumerate(projections)}, {b: i for i, b in enumerate(blocks)}
    for record in records:
        at = row[record["projection"]], column[record["block"]]
        cells[at[0]][at[1]] = found = value(record, show)
        told = "not measured" if found is None else format(found, form)
        said[at[0]][at[1]] = f"{record['layer']}<br>{name}: {told}"
    signed = show == "cosine"
    most = max((abs(x) for line in cells for x in line if x is not None), default=0.0) or 1.0
    low, high = (-most, most) if signed else (0.0, 1.0 if show in ("top", "outputs", "inputs") else most)
    fig.add_heatmap(
        z=cells, x=blocks, y=projections, text=said, hovertemplate="%{text}<extra></extra>", hoverongaps=False,
        colorscale=DIVERGING if signed else SCALE, zmin=low, zmax=high, xgap=1, ygap=1,
        colorbar={"orientation": "h", "thickness": 8, "len": 0.4, "x": 1, "xanchor": "right", "y": 1.02,
                  "yanchor": "bottom", "tickformat": ".0%" if "%" in form else ".3~g", "nticks": 4,
                  "title": {"text": name, "side": "top"}, "outlinewidth": 0},
    )  # fmt: skip
    fig.update_xaxes(type="category", showgrid=False, tickangle=-60, tickfont={"size": 11}, nticks=min(40, len(blocks)))
    fig.update_yaxes(type="category", showgrid=False, autorange="reversed", tickfont={"size": 12})
    return fig.update_layout(margin={"t": 58, "l": 20, "r": 10, "b": 20})


register(Plot("xray-map", "Map of a network", draw, order=80))
