"""Adapter methods. ADD A METHOD: one file in this folder (README.md here walks through it).

`METHODS` is the registry; `NoraConfig`, `NolaConfig` and `PrancConfig` are the public PEFT configurations.
"""

from __future__ import annotations

from lab.methods.spec import Knobs, Layer, Method, Paper, knob
from lab.registry import Registry

METHODS: Registry[Method] = Registry("method", "lab.methods")
register = METHODS.register

__all__ = ["METHODS", "Knobs", "Layer", "Method", "Paper", "knob", "register"]
