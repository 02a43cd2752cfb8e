"""Adapter methods. ADD A METHOD: one file in this folder (README.md here walks through it).

`METHODS` is the registry; `NoraConfig`, `NolaConfig` and `PrancConfig` are the public PEFT configurations.
"""

from __future__ import annotations

from typing import Any

from lab.methods.spec import Knobs, Layer, Method, Paper, knob
from lab.registry import Registry

METHODS: Registry[Method] = Registry("method", "lab.methods")
register = METHODS.register

__all__ = ["METHODS", "Knobs", "Layer", "Method", "Paper", "knob", "register"]


def __getattr__(name: str) -> Any:
    """NoraConfig and its like: the PEFT configuration of each of the lab's own methods, made on first use."""
    if name.endswith("Config"):
        from lab.methods.own import OwnMethod

        for method in METHODS:
            if isinstance(method, OwnMethod) and name.lower() == f"{method.peft_name}config":
                from lab.methods._tuner import config_class

                return config_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
