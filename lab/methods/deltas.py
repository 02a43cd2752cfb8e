"""The update ΔW of every adapted layer of a PeftModel, whichever method it is: for coverage, comparison and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Pair = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Delta:
    """One layer's update, detached, float32.

    `dense()` gives ΔW as (m, n), or (out, in, kh, kw) for a convolution; `factors()` gives (B (m, r), A (r, n)) with
    ΔW = B·A, all scales folded in, where the update is exactly of low rank, else None.
    """

    dense: Callable[[], torch.Tensor]
    factors: Callable[[], Pair | None]


def deltas(model: PeftModel, adapter: str = "default") -> dict[str, Delta]:
    """Layer name (as in the base model) → its update. Raises LabError when the model has no such adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if adapter not in model.peft_config:
        raise LabError(f"There is no adapter '{adapter}': the model has {', '.join(model.peft_config)}.")
    found = {}
    inner: Any = model.base_model.model
    for name, layer in inner.named_modules():
        if isinstance(layer, BaseTunerLayer) and _carries(layer, adapter):
            found[name] = _own(layer, adapter) if hasattr(layer, "methods") else _pefts(layer, adapter)
    return found


def _carries(layer: Any, adapter: str) -> bool:
    return adapter in layer._all_available_adapter_names()


def _own(layer: Any, adapter: str) -> Delta:
    def dense() -> torch.Tensor:
        return layer._shaped(layer.delta(adapter)).detach()

    def factors() -> Pair | None:
        with layer.full_precision():
            pair = layer.methods[adapter].factors(layer.tensors(adapter), layer.knobs[adapter], layer.layer)
        return None if pair is None else (pair[0].detach(), pair[1].detach())

    return Delta(dense, factors)


def _pefts(layer: Any, adapter: str) -> Delta:
    return Delta(lambda: _merged_change(layer, adapter), lambda: _lora_factors(layer, adapter))


def _lora_factors(layer: Any, adapter: str) -> Pair | None:
    """Plain LoRA's own factors; None for whatever does not end up as B·A."""
    import torch
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(layer, LoraLayer) or isinstance(layer, AdaLoraLayer) or adapter in layer.lora_variant:
        return None
    B, A = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    with torch.no_grad():
        return (B.flatten(1) * layer.scaling[adapter]).float(), A.flatten(1).float()


def _merged_change(layer: Any, adapter: str) -> torch.Tensor:
    """What merging this adapter adds to the weight, measured in float32 on a copy of it: right for every tuner,
    additive or not. The layer is left bit for bit as it was."""
    import torch
    from transformers.pytorch_utils import Conv1D

    pair = _lora_factors(layer, adapter)
    base = layer.get_base_layer()
    if pair is not None:
        return (pair[0] @ pair[1]).reshape(base.weight.T.shape if isinstance(base, Conv1D) else base.weight.shape)
    kept, merged = base.weight.data, list(layer.merged_adapters)
    bias = None if base.bias is None else base.bias.data
    try:
        layer.merged_adapters.clear()
        base.weight.data = kept.float().clone()
        with torch.no_grad():
            layer.merge(adapter_names=[adapter])
            change = base.weight.data - kept.float()
    finally:
        base.weight.data = kept
        if bias is not None:
            base.bias.data = bias
        layer.merged_adapters[:] = merged
    return change.T if isinstance(base, Conv1D) else change
