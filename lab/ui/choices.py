"""The registry of methods as the page's method picker takes it: rows, settings, parameter counts."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from lab.bases import Base, pick
from lab.errors import LabError
from lab.methods import METHODS, Method
from lab.plots import colour
from lab.registry import unknown
from lab.tasks.subject import layers

TICKED = ("lora", "nora")
PINNED = ("lora", "nora", "nola", "pranc", "dora", "vera")  # shown before the rest is unfolded
MAX_SETTINGS = 40


def knobs(method: Method, preset: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A method's settings as controls: name, help, type, bounds, choices, default (the base's preset, if it has one)."""
    types = typing.get_type_hints(method.knobs)
    rows = []
    for field in dataclasses.fields(method.knobs):
        meta = field.metadata
        if "help" not in meta:
            continue
        kinds = typing.get_args(types[field.name]) or (types[field.name],)
        kind = "choice" if meta["choices"] else "bool" if bool in kinds else "text" if str in kinds else None
        rows.append(
            {
                "name": field.name,
                "help": meta["help"],
                "type": kind or ("float" if float in kinds else "int"),
                "low": meta["low"],
                "high": meta["high"],
                "choices": list(meta["choices"] or ()),
                "default": (preset or {}).get(field.name, field.default),
            }
        )
    return rows


def rows(base: Base) -> list[dict[str, Any]]:
    """The picker's rows: the pinned methods first, then as the registry orders them."""
    ordered = sorted(METHODS, key=lambda m: PINNED.index(m.id) if m.id in PINNED else len(PINNED))
    presets = base.preset("knobs")
    return [
        {
            "id": method.id,
            "name": method.name,
            "kind": method.kind,
            "summary": method.summary,
            "colour": colour(method.id),
            "knobs": knobs(method, presets.get(method.id)),
        }
        for method in ordered
    ]


def checked(value: Any) -> dict[str, dict[str, Any]]:
    """{method id: settings} of the ticked methods, from what the browser sent. Raises LabError.

    The settings' names and values are checked where the task parses them; here only that they are short and plain.
    """
    if not isinstance(value, dict) or not isinstance(value.get("chosen"), list):
        raise LabError("No method was chosen: tick at least one.")
    given = value.get("knobs") if isinstance(value.get("knobs"), dict) else {}
    found: dict[str, dict[str, Any]] = {}
    for id in value["chosen"]:
        if not isinstance(id, str) or id not in METHODS:
            raise unknown("method", str(id)[:60], METHODS.ids())
        settings = given.get(id) or {}
        if not isinstance(settings, dict) or len(settings) > MAX_SETTINGS:
            raise LabError(f"The settings of {METHODS[id].name} could not be read: reload the page.")
        for name, setting in settings.items():
            if not isinstance(setting, (str, int, float, bool)) or len(str(setting)) > 200:
                raise LabError(f"The setting {str(name)[:60]} of {METHODS[id].name} must be a number or a short text.")
        found[id] = settings
    if not found:
        raise LabError("No method was chosen: tick at least one.")
    return found


def parsed(base: Base, method: Method, given: dict[str, Any]) -> Any:
    """The method's knobs from the visitor's settings over the base's preset. Raises LabError."""
    return method.knobs.parse({**base.preset("knobs").get(method.id, {}), **given})


def count(base: Base, targets: str, method: Method, settings: Any, text_encoder: bool = False) -> dict[str, Any]:
    """{"n", "text", "error"}: trainable parameters with these settings, or why there are none."""
    try:
        shapes = layers(base, targets or base.targets, text_encoder)
        for layer in shapes:
            method.check(layer, settings)
        number = method.count(shapes, settings)
    except LabError as problem:
        return {"n": None, "text": "does not fit", "error": str(problem)}
    except NotImplementedError:
        return {"n": None, "text": "–", "error": "not known before training"}
    return {"n": number, "text": f"{number:,}", "error": ""}


def counts(base_id: str, targets: str, value: Any, text_encoder: bool = False) -> dict[str, dict[str, Any]]:
    """`count` of every method by id, with the settings of the moment."""
    given = value.get("knobs") if isinstance(value, dict) and isinstance(value.get("knobs"), dict) else {}
    base = pick(base_id)
    found = {}
    for method in METHODS:
        try:
            settings = parsed(base, method, given.get(method.id) or {})
        except LabError as problem:
            found[method.id] = {"n": None, "text": "does not fit", "error": str(problem)}
        else:
            found[method.id] = count(base, targets, method, settings, text_encoder)
    return found
