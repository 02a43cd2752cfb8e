"""The part of PEFT's rows that needs torch: layers checked before anything changes, base weights kept and put back."""

from __future__ import annotations

from typing import Any

import torch

from lab.errors import LabError
from lab.methods._layer import describe
from lab.methods._tuner import targets_of
from lab.methods.spec import Layer


def checked_layers(model: torch.nn.Module, config: Any, method: Any, knobs: Any) -> list[Layer]:
    """Shapes of the layers the configuration's targets match, each checked against the settings."""
    layers = []
    for name, base in targets_of(model, config).items():
        layer = describe(name, base)
        method.refuse_conv(layer)
        method.check(layer, knobs)
        if base.weight.is_floating_point() and not bool(torch.isfinite(base.weight).all()):
            raise LabError(f"The base's weight of layer {name} holds NaN or infinity: load a sound base model.")
        layers.append(layer)
    return layers


def keep_weights(model: torch.nn.Module, layers: list[Layer]) -> dict[str, torch.Tensor]:
    """Copies of the layers' base weights."""
    modules = dict(model.named_modules())
    found = {}
    for layer in layers:
        module: Any = modules[layer.name]
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        found[layer.name] = base.weight.detach().clone()
    return found


def restore_on_unload(model: Any, kept: dict[str, torch.Tensor]) -> None:
    """Make `model.unload()` put the kept weights back: a start like PiSSA's takes its own value off the base."""
    tuner = model.base_model
    plain = tuner.unload

    def unload() -> torch.nn.Module:
        inner = plain()
        for name, weight in kept.items():
            module = inner.get_submodule(name)
            module.weight.data = weight.to(module.weight.device, module.weight.dtype)
        return inner

    tuner.unload = unload
