"""The layer that carries the lab's own adapters: one class for linear layers, Conv1D and Conv2d."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from lab.errors import LabError
from lab.methods import _fused as fused
from lab.methods.own import OwnMethod, Tensors
from lab.methods.spec import Layer
from lab.targets import role_of


def describe(name: str, module: nn.Module) -> Layer:
    """Shape of an adaptable module. Raises LabError, naming the layer, for any other kind."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            raise LabError(f"Layer {name} is a grouped convolution ({module.groups} groups): leave it out.")
        kernel = (module.kernel_size[0], module.kernel_size[1])
        return Layer(name, module.out_channels, module.in_channels, kernel, role_of(name), bias)
    if isinstance(module, Conv1D):
        return Layer(name, module.weight.shape[1], module.weight.shape[0], None, role_of(name), bias)
    if isinstance(module, nn.Linear):
        return Layer(name, module.out_features, module.in_features, None, role_of(name), bias)
    raise LabError(f"Layer {name} is a {type(module).__name__}: adapters go on linear layers, Conv1D and Conv2d.")


class OwnLayer(nn.Module, BaseTunerLayer):
    """A base layer with any number of adapters of one method.

    Trained tensors are in `nn.ParameterDict`s called prefix + tensor name, frozen ones in buffers that are not part
    of the state dict. Adapters are float32 whatever the base's dtype; outside autocast they compute in float32.
    """

    def __init__(self, base_layer: nn.Module, name: str, prefix: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix = prefix
        self.layer = describe(name, self.get_base_layer())
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ("methods", "knobs", "shared")
        self._containers: list[tuple[str, Any]] = []  # tensor name, where it is held
        self.methods: dict[str, OwnMethod] = {}
        self.knobs: dict[str, Any] = {}
        self.shared: dict[str, dict[str, nn.ParameterDict]] = {}  # held on the tuner model, seen from here
        self.stages: dict[str, Any] = {}  # what OwnMethod.stage said of the current training step
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept: tuple[nn.Parameter, torch.Tensor | None] | None = None  # W while something is merged into it
        self._kept_state: Any = None  # and, of a quantised W, what belongs to it

    # -- tensors ------------------------------------------------------------------------------------------
    def add(
        self, adapter: str, method: OwnMethod, knobs: Any, tensors: Tensors, shared: dict[str, nn.ParameterDict]
    ) -> None:
        """Take an adapter's starting tensors."""
        for name, value in tensors.trained.items():
            self._container(name, nn.ParameterDict)[adapter] = nn.Parameter(value.detach().clone())
        for name, value in tensors.frozen.items():
            self._container(name, BufferDict)[adapter] = value.detach()
        self.methods[adapter], self.knobs[adapter], self.shared[adapter] = method, knobs, shared
        self.stages.pop(adapter, None)

    def _container(self, name: str, kind: type) -> Any:
        attribute = self.prefix + name
        if not hasattr(self, attribute):
            setattr(self, attribute, kind())
            self._containers.append((name, getattr(self, attribute)))
            if kind is nn.ParameterDict:
                self.adapter_layer_names += (attribute,)
            else:
                self.other_param_names += (attribute,)
        return getattr(self, attribute)

    def tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """An adapter's tensors by name: trained, frozen, shared, and "weight" where the method asks for it."""
        found: dict[str, torch.Tensor] = {}
        for name, container in self._containers:  # by the modules' own dictionaries: this runs in every forward pass
            held = container._parameters if isinstance(container, nn.ParameterDict) else container._buffers
            if adapter in held:
                found[name] = held[adapter]
        for name, container in self.shared[adapter].items():
            found[name] = container[adapter]
        if self.methods[adapter].uses_weight:
            found["weight"] = self.weight_matrix()
        return found

    def frozen(self, adapter: str) -> dict[str, torch.Tensor]:
        """The adapter's frozen tensors by name: the buffers themselves."""
        return {
            attribute.removeprefix(self.prefix): getattr(self, attribute)[adapter]
            for attribute in self.other_param_names[3:]
            if adapter in getattr(self, attribute)
        }

    def weight_matrix(self) -> torch.Tensor:
        """The base weight, as it is without adapters, seen as (m, n), float32, dequantised."""
        return as_matrix(self.get_base_layer(), self._unmerged_weight()).float()

    def _unmerged_weight(self) -> torch.Tensor:
        if self._kept is not None and self.quantization_backend is None and self._kept[1] is not None:
            return self._kept[1].to(self.weight.device)
        if self._kept is not None:
            raise LabError(f"Layer {self.layer.name}: unmerge the quantised base before its weight is used.")
        return self.get_base_weight()

    def delta(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter, (m, n), float32."""
        method = self.methods[adapter]
        with self.full_precision():
            return method.delta(self.tensors(adapter), self.knobs[adapter], self.layer)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW in the shape of the base weight, as PEFT's tuners give it."""
        delta = self.delta(adapter)
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else self._shaped(delta)

    def _shaped(self, delta: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return delta.reshape(layer.out, layer.in_, *layer.kernel) if layer.kernel else delta

    # -- forward ------------------------------------------------------------------------------------------
    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which small products of adapter tensors stay in float32 under autocast."""
        device = self.weight.device.type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()

    def low_rank(self, x: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """B·(A·x): tokens x (..., n) → (..., m); images through a convolution by A, then 1×1 by B."""
        base: Any = self.get_base_layer()
        if not isinstance(base, nn.Conv2d):
            # By Bᵀ (r, m) in rows: the gradients' thin products are then several times faster than by B in rows.
            return torch.matmul(F.linear(x, A), B.T.contiguous())
        kernel = A.reshape(A.shape[0], self.layer.in_, *base.kernel_size)
        return F.conv2d(base._conv_forward(x, kernel, None), B[:, :, None, None])

    def dense(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """ΔW·x: tokens x (..., n) → (..., m), or the convolution by ΔW."""
        base: Any = self.get_base_layer()
        if not isinstance(base, nn.Conv2d):
            return F.linear(x, delta)
        return base._conv_forward(x, self._shaped(delta), None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        adapters = [a for a in self.active_adapters if a in self.methods]
        if (whole := self._in_one(x, adapters)) is not None:
            return whole
        result = self.base_layer(x, *args, **kwargs)
        inputs = x if torch.is_autocast_enabled(x.device.type) else x.float()
        for adapter in adapters:
            added = self.methods[adapter].forward(self, inputs, self._seen(adapter), self.knobs[adapter])
            result = result + added.to(result.dtype)
        return result

    def _seen(self, adapter: str) -> Mapping[str, torch.Tensor]:
        """The adapter's tensors as this forward pass sees them: in training, as the step's stage says."""
        t, stage = self.tensors(adapter), self.stages.get(adapter)
        if stage is None or not self.training:
            return t
        return self.methods[adapter].staged(t, stage, self.knobs[adapter])

    def _in_one(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor | None:
        """The base layer and its adapters in one go, on a plain float32 layer: a low-rank update within the layer's own
        products, full-rank ones by one product with W + ΔW.

        None where that would lose digits (lower precisions), or where something else wants to see the layer's parts.
        """
        base: Any = self.get_base_layer()
        if not adapters or type(base) not in (nn.Linear, nn.Conv2d) or base._forward_hooks or base._forward_pre_hooks:
            return None
        weight, bias = base.weight, base.bias
        if weight.dtype != torch.float32 or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return None
        if any(type(self.methods[a]).forward is not OwnMethod.forward for a in adapters):
            return None
        if all(self.methods[a].dense(self.layer, self.knobs[a]) for a in adapters):
            for adapter in adapters:
                delta = self.methods[adapter].delta(self._seen(adapter), self.knobs[adapter], self.layer)
                weight = weight + self._shaped(delta)
            return base._conv_forward(x, weight, bias) if self.layer.kernel else F.linear(x, weight, bias)
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if len(adapters) > 1 or self.layer.kernel or not frozen:
            return None
        method, seen, knobs = self.methods[adapters[0]], self._seen(adapters[0]), self.knobs[adapters[0]]
        if (made := method.by_hand(seen, knobs, self.layer)) is not None:
            return fused.by_hand(x, weight, bias, made)
        pair = method.factors(seen, knobs, self.layer)
        return None if pair is None else fused.linear(x, weight, bias, *pair)

    # -- merging --------------------------------------------------------------------------------------------
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the base weight; W is kept and comes back bit for bit on `unmerge`.

        Raises LabError, naming the layer, if `safe_merge` finds a number that is not finite, or if the method
        cannot be merged.
        """
        names = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.methods]
        for adapter in names:
            if not self.methods[adapter].mergeable:
                raise LabError(f"{self.methods[adapter].name} is no fixed change of the weight: it cannot be merged.")
            base: Any = self.get_base_layer()
            weight = self.get_base_weight()
            delta = self.get_delta_weight(adapter)
            merged = (weight.float() + delta).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise LabError(f"Layer {self.layer.name}: the merged weight is not finite, so nothing was merged.")
            if self._kept is None:
                self._kept = (base.weight, None if self.quantization_backend else base.weight.data)
                self._kept_state = (dict(base.weight.__dict__), copy.copy(getattr(base, "state", None)))
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the kept W back."""
        if not self.merged or self._kept is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        parameter, data = self._kept
        if data is None:  # quantised: the whole parameter with its quantisation state
            attributes, state = self._kept_state
            parameter.__dict__.update(attributes)  # bitsandbytes marks the old weight while it makes the new one
            base.weight = parameter
            if state is not None:
                base.state = state
        else:
            base.weight.data = data.to(base.weight.device, base.weight.dtype)
        self._kept = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.methods[adapter_name].mergeable if adapter_name in self.methods else True

    def __repr__(self) -> str:
        return "lab." + super().__repr__()


def check_finite(name: str, base: nn.Module) -> None:
    """Raise LabError, naming the layer, when its weight holds NaN or infinity."""
    weight: Any = base.weight
    if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
        raise LabError(f"The base's weight of layer {name} holds NaN or infinity: load a sound base model.")


def as_matrix(base: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A base layer's weight (or a gradient of its shape) seen as (out, in·kh·kw)."""
    return weight.T if isinstance(base, Conv1D) else weight.reshape(weight.shape[0], -1)


def stacked(
    b: torch.Tensor, start_b: torch.Tensor, a: torch.Tensor, step_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([b, start_b] (m, 2r), [a; step_a] (2r, n)): the factors of b·a + start_b·step_a.

    With b = B−B₀ and step_a = A−A₀ that is B·A − B₀·A₀, exactly zero at the start and without cancellation near it.
    """
    return torch.cat((b, start_b), dim=1), torch.cat((a, step_a), dim=0)
