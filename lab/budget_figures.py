"""The Budget tab's charts from its rows: plain data for lab/plots/budget_*.py. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lab import budget
from lab.architectures import Row
from lab.errors import LabError
from lab.methods import METHODS, Method
from lab.plots import budget_curve, budget_files, budget_layers

if TYPE_CHECKING:
    from lab.budget_report import Picked

ROLES = ("q", "k", "v", "out", "up", "down", "gate", "conv")
RANKS = ("r", "rank", "r_inner", "init_r")  # knobs that are the update's rank


def figures(rows: list[dict[str, Any]], picked: Picked) -> dict[str, Any]:
    """The charts as plain plotly data; methods that do not fit are left out."""
    shown = [row for row in rows if row["count"]]
    curves: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    kinds: list[dict[str, Any]] = []
    for row in shown:
        method = METHODS[row["id"]]
        knobs = method.knobs.parse(_plain(row["knobs"]))
        head = {"method": row["id"], "name": row["name"]}
        curves.append({**head, **curve(method, knobs, picked, row)})
        blocks.append({**head, **by_block(method, knobs, picked, row["count"])})
        kinds.append({**head, **by_kind(method, knobs, picked, row["count"])})
    return {
        "curve": budget_curve.figure(curves, floor=picked.floor),
        "layers": budget_layers.figure(blocks),
        "kinds": budget_layers.figure(kinds),
        "files": budget_files.figure([{"method": r["id"], "name": r["name"], "bytes": r["bytes"]} for r in shown]),
    }


def _plain(knobs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in knobs.items() if v is not None}


def curve(method: Method, knobs: Any, picked: Picked, row: dict[str, Any]) -> dict[str, Any]:
    """Counts over the method's rank, or over its size where it has no rank: {"knob", "points", "chosen"}."""
    names = [f.name for f in budget.knob_fields(method)]
    name = next((n for n in RANKS if n in names), "") or next(
        (f.name for f in budget.knob_fields(method, size=True)), ""
    )
    if not name:
        return {"knob": "fixed size", "points": [[1, row["count"]], [512, row["count"]]], "chosen": [1, row["count"]]}
    spec = next((c for c in row["controls"] if c["name"] == name), None)
    value = getattr(knobs, name)
    if spec and spec["values"]:
        tried = spec["values"]
    elif isinstance(value, float) and value < 1:
        tried = [i / 16 for i in range(1, 17)]
    else:
        high = min(spec["high"] if spec else 512, max(512, 2 * value))
        tried = sorted({*(2**i for i in range(17) if 2**i <= high), value})
    points = []
    for x in tried:
        try:
            setting = dataclasses.replace(knobs, **{name: x})
            budget.check(method, picked.layers, setting)
            points.append([x, budget.count(method, picked.layers, setting)])
        except LabError:
            continue
    return {"knob": name, "points": points, "chosen": [value, row["count"]]}


def by_block(method: Method, knobs: Any, picked: Picked, total: int) -> dict[str, Any]:
    """Parameters of each block: {"blocks", "counts"}; what layers share stands in a block of its own."""

    def label(number: int, row: Row) -> str:
        tower = f"text encoder {number}" if number else row.part
        return f"{tower} {row.block}" if tower else f"block {row.block}"

    return _summed(method, knobs, picked, total, label)


def by_kind(method: Method, knobs: Any, picked: Picked, total: int) -> dict[str, Any]:
    """Parameters of all layers of a kind (q, k, v, …), as `by_block` gives them for blocks."""
    found = _summed(method, knobs, picked, total, lambda _number, row: row.layer.role)
    order = [*(kind for kind in (*ROLES, "qkv", "shared") if kind in found["blocks"])]
    counts = dict(zip(found["blocks"], found["counts"], strict=True))
    return {"blocks": order, "counts": [counts[kind] for kind in order]}


def _summed(method: Method, knobs: Any, picked: Picked, total: int, label: Callable[[int, Row], str]) -> dict[str, Any]:
    sums: dict[str, int] = {}
    try:
        each = {layer: method.count_layer(layer, knobs) for layer, _ in budget.shapes(picked.layers)}
    except NotImplementedError:
        return {"blocks": ["shared"], "counts": [total]}
    by_shape = {(x.out, x.in_, x.kernel, x.role, x.bias): n for x, n in each.items()}
    for number, (_, rows) in enumerate(picked.groups):
        for row in sorted(rows, key=lambda row: (row.part, row.block)):  # a UNet lists its middle last
            x, name = row.layer, label(number, row)
            sums[name] = sums.get(name, 0) + by_shape[(x.out, x.in_, x.kernel, x.role, x.bias)]
    if (rest := total - sum(sums.values())) > 0:
        sums["shared"] = rest
    return {"blocks": list(sums), "counts": list(sums.values())}
