"""Everything the Budget tab shows, from its state: plain data in, plain data out. Imports no torch and no Gradio.

The state is what the address bar holds: {"arch", "targets", "blocks", "part", "te", "methods": {id: settings},
"budget", "batch", "size", "precision"}. `report(state)` gives rows, figures, and the state as it was understood.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from lab import architectures, budget, budget_search, memory
from lab.architectures import Architecture, Row
from lab.brought import BROUGHT
from lab.budget_figures import RANKS, figures
from lab.errors import LabError
from lab.methods import METHODS, Layer, Method
from lab.plots import colour
from lab.registry import unknown

DEFAULT: dict[str, Any] = {
    "arch": "sdxl-unet",
    "targets": ["q", "k", "v", "out"],
    "blocks": None,
    "part": "",
    "te": False,
    "methods": {"lora": {}, "nora": {}, "nola": {}, "dora": {}, "vera": {}},
    "budget": None,
    "batch": 1,
    "size": 1.0,
    "precision": "bf16",
}
MAX_METHODS = 12
MAX_KNOB = 100_000  # of a slider whose method sets no end


# -- the state -------------------------------------------------------------------------------------------
@dataclass
class Picked:
    """The layers that a state chooses, and what does not change while sliders move."""

    arch: Architecture
    groups: list[tuple[Architecture, list[Row]]]  # the architecture's rows, then each adapted text encoder's
    layers: list[Layer]
    parameters: int
    floor: int  # LoRA at rank 1


_picked: OrderedDict[str, Picked] = OrderedDict()


def pick(state: dict[str, Any]) -> Picked:
    """The layers of a checked state. Raises LabError when it chooses none."""
    key = repr([state[k] for k in ("arch", "targets", "blocks", "part", "te")])
    found = _picked.get(key)
    if found is not None and (found.arch.id.startswith("own-") or found.arch is architectures.load(found.arch.id)):
        return found
    arch = BROUGHT.get(state["arch"]) if state["arch"].startswith("own-") else architectures.load(state["arch"])
    blocks = tuple(state["blocks"]) if state["blocks"] else None
    groups = [(arch, arch.select(state["targets"], blocks=blocks, part=state["part"]))]
    if state["te"] and arch.companions:
        linear = [t for t in state["targets"] if t != "conv"] or ["q", "k", "v", "out"]
        for id in arch.companions:
            encoder = architectures.load(id)
            groups.append((encoder, encoder.select(linear)))
    layers = [row.layer for _, rows in groups for row in rows]
    lora = METHODS["lora"]
    floor = budget.count(lora, layers, lora.knobs.parse({"r": 1}))
    made = Picked(arch, groups, layers, sum(model.parameters for model, _ in groups), floor)
    _picked[key] = made
    while len(_picked) > 64:
        _picked.popitem(last=False)
    return made


def checked(given: Any) -> dict[str, Any]:
    """A state with every part there and of its kind. Raises LabError on values that do not fit."""
    if not isinstance(given, dict):
        raise LabError("The page's settings could not be read: reload it.")
    state = {**DEFAULT, **{k: v for k, v in given.items() if k in DEFAULT}}
    state["arch"] = str(state["arch"])[:80]
    targets = state["targets"] if isinstance(state["targets"], list) else str(state["targets"]).split(",")
    state["targets"] = [t for t in map(str, targets) if t][:20]
    state["blocks"] = _blocks(state["blocks"])
    state["part"] = str(state["part"] or "")[:20]
    state["te"] = state["te"] in (True, 1, "1", "true")
    state["methods"] = _methods(state["methods"])
    state["budget"] = None if state["budget"] in (None, "") else budget.check_budget(state["budget"])
    state["batch"] = int(_number(state["batch"], "The batch", 1, memory.MAX_BATCH))
    state["size"] = _number(state["size"], "The sample's size", 0.05, 16)
    if state["precision"] not in memory.BYTES:
        raise LabError(f"The precision is one of {', '.join(memory.BYTES)}, got '{str(state['precision'])[:40]}'.")
    return state


def _number(value: Any, what: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LabError(f"{what} must be a number, got '{str(value)[:40]}'.") from None
    if not low <= number <= high:
        raise LabError(f"{what} must be between {low:g} and {high:,g}, got {number:g}.")
    return number


def _blocks(value: Any) -> list[int] | None:
    if not value:
        return None
    try:
        low, high = (int(v) for v in value)
    except (TypeError, ValueError):
        raise LabError("The range of blocks is two whole numbers.") from None
    if not 0 <= low <= high:
        raise LabError(f"The range of blocks must grow from 0, got {low} to {high}.")
    return [low, high]


def _methods(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or len(value) > MAX_METHODS:
        raise LabError(f"Choose at most {MAX_METHODS} methods.")
    found = {}
    for id, settings in value.items():
        if id not in METHODS:
            if value is DEFAULT["methods"]:
                continue
            raise unknown("method", str(id)[:60], METHODS.ids())
        if not isinstance(settings, dict) or len(settings) > 40:
            raise LabError(f"The settings of {METHODS[id].name} could not be read: reload the page.")
        for name, setting in settings.items():
            if not isinstance(setting, (str, int, float, bool)) or len(str(setting)) > 100:
                raise LabError(f"The setting {str(name)[:60]} of {METHODS[id].name} must be a number or a short text.")
        found[id] = settings
    return found


# -- the report -------------------------------------------------------------------------------------------
def report(given: Any) -> dict[str, Any]:
    """What the tab shows for a state. Raises LabError when the state is no state or chooses no layers; a method whose
    settings do not fit has its sentence in its row instead."""
    state = checked(given)
    picked = pick(state)
    rows = [_row(METHODS[id], settings, state, picked) for id, settings in state["methods"].items()]
    beside = next((row["count"] for row in rows if row["id"] == "lora" and row["count"]), None)
    for row in rows:
        if row["count"]:
            row["below_floor"] = picked.floor / row["count"]
            row["below_lora"] = beside / row["count"] if beside else None
    return {
        "state": state,
        "arch": _arch(state, picked),
        "rows": rows,
        "figures": figures(rows, picked),
        "link": link(state),
    }


def _arch(state: dict[str, Any], picked: Picked) -> dict[str, Any]:
    arch = picked.arch
    return {
        "id": arch.id,
        "name": arch.name,
        "parameters": picked.parameters,
        "source": arch.source,
        "note": _note(arch, state["targets"]),
        "targets": arch.targets,
        "blocks": arch.blocks,
        "parts": arch.parts,
        "companions": [architectures.names().get(id, id) for id in arch.companions],
        "layers": len(picked.layers),
        "floor": picked.floor,
        "memory": memory.known(arch),
        "unit": arch.unit,
    }


def _note(arch: Architecture, targets: list[str]) -> str:
    """What there is to say of the architecture: how its fused layers are counted, for these targets."""
    counted = arch.fused(targets)
    if any(row.layer.role == "qkv" for row in arch.rows) and not counted:
        return ""  # the fused layers are not adapted
    note = arch.note or ("Query, key and value are one fused layer." if counted else "")
    return note + {"whole": " Here: whole.", "split": " Here: each as a square.", "": ""}[counted]


def _row(method: Method, settings: dict[str, Any], state: dict[str, Any], picked: Picked) -> dict[str, Any]:
    row: dict[str, Any] = {"id": method.id, "name": method.name, "colour": colour(method.id), "kind": method.kind}
    row |= {"count": None, "error": "", "note": "", "miss": None, "knobs": {}, "controls": []}
    try:
        knobs = method.knobs.parse(settings)
        row["controls"] = controls(method, picked, knobs)
        if state["budget"] is not None:
            found = budget.solve(method, picked.layers, state["budget"], knobs)
            knobs = found.knobs
            row |= {"note": found.note, "miss": found.miss}
        row["knobs"] = budget.as_dict(knobs)
        budget.check(method, picked.layers, knobs)
        total = budget.count(method, picked.layers, knobs)
    except LabError as problem:
        return row | {"error": str(problem)}
    except NotImplementedError:
        return row | {"error": f"{method.name} says how large it is only when it is trained."}
    row |= {"count": total, "share": total / picked.parameters, "bytes": budget.sizes(total)}
    return row | {"memory": _memory(method, knobs, state, picked, total)}


def _memory(method: Method, knobs: Any, state: dict[str, Any], picked: Picked, total: int) -> dict[str, int | None]:
    """Memory of the state's model; adapted text encoders add theirs."""
    optimizer = {"gradients": memory.TRAINED * total, "optimizer": 2 * memory.TRAINED * total}
    if not all(memory.known(model) for model, _ in picked.groups):
        return {**optimizer, "adapter": None, "training": None}
    parts = []
    given = {"batch": state["batch"], "precision": state["precision"]}
    alone = total if len(picked.groups) == 1 else None
    for model, rows in picked.groups:
        size = state["size"] if model is picked.arch else 1.0
        parts.append(memory.estimate(model, rows, method, knobs, size=size, trained=alone, **given))
    return {
        **optimizer,
        "adapter": sum(p.adapter for p in parts),
        "training": sum(p.total for p in parts),
    }


# -- sliders -------------------------------------------------------------------------------------------
_ends: dict[Any, Any] = {}


def sliders(method: Method) -> list[dataclasses.Field[Any]]:
    """The knobs with a slider: those that decide the count, and a rank that does not (NOLA's)."""
    fields = budget.knob_fields(method)
    ranks = [
        f for f in fields if f.name in RANKS and not f.metadata["size"] and type(f.default) is int and f.default > 0
    ]
    return [*budget.knob_fields(method, size=True), *ranks]


def controls(method: Method, picked: Picked, knobs: Any) -> list[dict[str, Any]]:
    """The knobs that decide the count, and the rank, as sliders: {"name", "help", "low", "high", "whole", "values",
    "default", "size"}.

    A slider ends where the settings stop fitting the layers; `values` lists what fits where that is not a range.
    """
    found = []
    for field in sliders(method):
        value = getattr(knobs, field.name)
        fraction = isinstance(value, float) and value < 1
        key = (method.id, field.name, fraction, id(picked))
        if key not in _ends:
            if len(_ends) > 2000:
                _ends.clear()
            _ends[key] = (picked, _range(method, picked, field, fraction))
        low, high, values = _ends[key][1]
        found.append(
            {
                "name": field.name,
                "help": field.metadata["help"],
                "low": low,
                "high": max(high, value) if not values else high,
                "whole": not fraction,
                "values": values,
                "default": field.default,
                "size": field.metadata["size"],
            }
        )
    return found


def _range(method: Method, picked: Picked, field: Any, fraction: bool) -> tuple[float, float, list[int]]:
    meta = field.metadata
    low = max(1, math.ceil(meta["low"])) if meta["low"] is not None else 1
    high = int(meta["high"]) if meta["high"] is not None else MAX_KNOB
    if fraction:
        return 0.001, 1.0, []
    default = method.knobs()
    if field.name in RANKS and isinstance(field.default, int):
        high = min(high, max(field.default, *(min(layer.m, layer.n) for layer in picked.layers)))

    def fits(u: int) -> bool:
        # Other size knobs at their smallest, so that a limit between two knobs does not end this one's slider.
        others = {f.name: max(1, math.ceil(f.metadata["low"] or 1)) for f in budget.knob_fields(method, size=True)}
        others = {k: v for k, v in others.items() if not isinstance(getattr(default, k), float)}
        try:
            budget.check(method, picked.layers, dataclasses.replace(default, **{**others, field.name: u}))
        except LabError:
            return False
        return True

    grid = [u for u in (2**i for i in range(18)) if low <= u <= high]
    valid = [u for u in grid if fits(u)]
    divisors = [u for u in budget_search.divisors(picked.layers) if low <= u <= high]
    if valid and any(fits(u + 1) for u in valid if 4 <= u < high):
        edge = valid[-1]
        for step in (u for u in reversed(grid) if u < max(2, edge)):
            while edge + step <= high and fits(edge + step):
                edge += step
        return low, edge, []
    values = [u for u in sorted({*divisors, *grid}) if fits(u)]
    return (values[0], values[-1], values) if values else (low, high, [])


# -- the link ------------------------------------------------------------------------------------------
def link(state: dict[str, Any]) -> dict[str, str]:
    """The state as parameters of the address bar; what is at its default is left out."""
    found: dict[str, str] = {"arch": state["arch"], "targets": ",".join(state["targets"])}
    found["m"] = "~".join(
        ":".join(part for part in (id, ",".join(f"{k}={v}" for k, v in settings.items())) if part)
        for id, settings in state["methods"].items()
    )
    if state["blocks"]:
        found["blocks"] = "-".join(map(str, state["blocks"]))
    for name in ("part", "te", "budget", "batch", "size", "precision"):
        if state[name] != DEFAULT[name] and state[name] not in (None, ""):
            found[name] = "1" if state[name] is True else f"{state[name]:g}" if name == "size" else str(state[name])
    return found


def from_link(query: dict[str, str]) -> dict[str, Any]:
    """The state that address-bar parameters stand for. Raises LabError on ones that do not fit."""
    state: dict[str, Any] = dict(DEFAULT)
    for name in ("arch", "part", "te", "budget", "batch", "size", "precision"):
        if query.get(name):
            state[name] = query[name]
    if query.get("targets"):
        state["targets"] = query["targets"].split(",")
    if query.get("blocks"):
        state["blocks"] = query["blocks"].split("-")
    if query.get("m"):
        methods: dict[str, dict[str, Any]] = {}
        for part in query["m"].split("~")[: MAX_METHODS + 1]:
            id, _, settings = part.partition(":")
            methods[id] = dict(pair.split("=", 1) for pair in settings.split(",") if "=" in pair)
        state["methods"] = methods
    return checked(state)
