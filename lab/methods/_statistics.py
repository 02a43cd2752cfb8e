"""What one batch says of the layers to be adapted: input activations, or the loss's gradient by the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lab.errors import LabError
from lab.methods._layer import as_matrix


def measure(model: Any, config: Any, need: str, calibrate: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layer name → root mean square of each input channel (n,), or gradient (m, n), float32.

    `calibrate()` runs one batch through `model` and returns its loss. The model is left as it was.
    """
    from peft import PeftModel

    from lab.methods._tuner import targets_of

    inner = model.base_model.model if isinstance(model, PeftModel) else model
    targets = targets_of(inner, config)
    found = (activations if need == "activations" else gradients)(targets, calibrate)
    for name in targets:
        if name not in found:
            raise LabError(f"The calibration batch did not pass through layer {name}.")
        if not bool(torch.isfinite(found[name]).all()):
            raise LabError(f"The calibration batch gives NaN or infinity at layer {name}.")
    return found


def activations(targets: dict[str, nn.Module], calibrate: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Root mean square of each column of the layer's input matrix; for a convolution, of each input patch's entry."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().float()
            if isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(x, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)
            x = x.reshape(-1, x.shape[-1])
            sums[name] = sums.get(name, 0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + x.shape[0]

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in targets.items()]
    try:
        with torch.no_grad():
            calibrate()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name] / max(counts[name], 1)).sqrt() for name in sums}


def gradients(targets: dict[str, nn.Module], calibrate: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss's gradient by each weight, seen as (m, n). Raises LabError on a quantised base."""
    found: dict[str, torch.Tensor] = {}
    before: list[tuple[nn.Parameter, bool]] = []
    handles = []

    def hook(name: str, base: nn.Module) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            found[name] = found.get(name, 0) + as_matrix(base, parameter.grad).float()
            parameter.grad = None

        return take

    for name, module in targets.items():
        base: Any = module
        if not base.weight.is_floating_point():
            raise LabError(f"Layer {name} is quantised: it has no gradient to start from.")
        before.append((base.weight, base.weight.requires_grad))
        base.weight.requires_grad_(True)
        handles.append(base.weight.register_post_accumulate_grad_hook(hook(name, base)))
    try:
        with torch.enable_grad():
            calibrate().backward()
    finally:
        for handle in handles:
            handle.remove()
        for weight, flag in before:
            weight.requires_grad_(flag)
            weight.grad = None
    return found
