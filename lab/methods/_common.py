"""Checks that several methods make. Imports no torch."""

from __future__ import annotations

from lab.errors import LabError
from lab.methods.spec import Layer


def check_rank(layer: Layer, r: int, name: str = "r") -> None:
    """Raises LabError, naming the layer, when r is more than the smaller side of the weight."""
    if r > min(layer.m, layer.n):
        raise LabError(
            f"{name} is {r}, but layer {layer.name} is {layer.m}×{layer.n}: take at most {min(layer.m, layer.n)}."
        )


def check_divides(layer: Layer, number: int, name: str) -> None:
    """Raises LabError, naming the layer, unless the number divides both sides of the weight."""
    if layer.m % number or layer.n % number:
        raise LabError(
            f"{name} is {number}, which does not divide both sides of layer {layer.name}, {layer.m}×{layer.n}."
        )
