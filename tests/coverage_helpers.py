"""A method's map from parameters to update, as the coverage tests want it."""

from __future__ import annotations

from typing import Any

from lab.coverage import maps
from lab.coverage.curves import settings, update_map
from lab.methods import METHODS


def made(id: str, d: int, n: int, **options: Any) -> tuple[maps.UpdateMap, Any]:
    """The map of method `id` on a d × d layer at about n parameters, and its settings."""
    knobs = settings(METHODS[id], d, n).knobs
    return update_map(METHODS[id], d, knobs, 0, **options), knobs
