"""What a frozen model keeps for the backward pass, found by passing fake tensors through it: shapes, no numbers.

Used when the layer tables are made (assets/architectures/make.py), so that the page's memory estimate is arithmetic.
A fake training step runs the real code of the model with tensors that have a shape and no storage; every allocation
is counted as it is made and freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, fake or real, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.add(leaf)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is not None:
            return

        def freed(_: Any, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass
class Traced:
    """One sample's passage: bytes in float32."""

    kept: int = 0  # what the frozen model keeps for the backward pass
    peak: int = 0  # highest count of bytes alive beside the weights, at any time of the step
    inputs: dict[str, tuple[int, int, bool]] = field(default_factory=dict)  # layer → tokens, tensor number, kept


def trace(
    make: Callable[[], torch.nn.Module],
    inputs: Callable[[torch.nn.Module], dict[str, Any]],
    names: list[str],
    *,
    start: set[str],
) -> Traced:
    """A fake forward and backward pass of the frozen model (made on the meta device) with adapters on the layers
    `start`.

    An adapter is stood in for by one number added to its layer's output: gradients flow from there on as they do
    with a real one, and nothing is kept for it. `names`: the layers whose inputs are looked at.
    """
    found, model = Traced(), make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _fake(model).requires_grad_(False).train(False)
        probe = torch.zeros((), requires_grad=True)
        modules = {name: module for name, module in model.named_modules() if name in set(names)}
        frozen = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        hooks = [m.register_forward_hook(lambda _m, _i, out: out + probe) for n, m in modules.items() if n in start]
        given = inputs(model)
        found.kept, found.inputs = _look(model, given, modules, frozen)
        counter = Allocations()
        for tensor in [*model.parameters(), *model.buffers()]:
            counter.add(tensor)
        weights = counter.now
        with counter:
            mean_square(model(**inputs(model))).backward()
        found.peak = counter.peak - weights
        for hook in hooks:
            hook.remove()
    return found


def _fake(model: torch.nn.Module) -> torch.nn.Module:
    """The model's tensors as fake ones of the CPU, whose attention kernels keep what a GPU's do."""
    made: dict[int, Any] = {}  # by the tensor it stands for: tied weights stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=old.dtype)
                module._parameters[name] = made.setdefault(id(old), torch.nn.Parameter(new, requires_grad=False))
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = made.setdefault(id(old), torch.empty(old.shape, dtype=old.dtype))
    return model


def _look(
    model: torch.nn.Module, given: dict[str, Any], modules: dict[str, torch.nn.Module], frozen: set[int]
) -> tuple[int, dict[str, tuple[int, int, bool]]]:
    """Bytes kept by autograd, and every layer's input: how many positions, which tensor, whether it is kept."""
    alive: list[Any] = []  # keeps storages apart: a freed one's address would be used again
    kept: dict[int, int] = {}
    seen: dict[str, tuple[int, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage._cdata not in frozen:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            alive.append(x.untyped_storage())
            out = out[0] if isinstance(out, tuple) else out
            wide = isinstance(module, torch.nn.Conv2d)
            tokens = out.numel() // (module.out_channels if wide else out.shape[-1])  # type: ignore[operator]
            seen[name] = (tokens, x.untyped_storage()._cdata)

        return hook

    hooks = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in modules.items()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(mean_square(model(**given)))
    for hook in hooks:
        hook.remove()
    numbers = {storage: i for i, storage in enumerate(dict.fromkeys(s for _, s in seen.values()))}
    return sum(kept.values()), {name: (t, numbers[s], s in kept) for name, (t, s) in seen.items()}


def mean_square(out: Any) -> torch.Tensor:
    """A scalar from whatever the model returns: its own loss, or the mean square of its first tensor."""
    if getattr(out, "loss", None) is not None:
        return out.loss
    if hasattr(out, "logits_per_image"):
        return out.logits_per_image.float().pow(2).mean()
    values = tuple(out.values()) if hasattr(out, "keys") else out
    return next(t for t in tree_leaves(values) if torch.is_tensor(t)).float().pow(2).mean()
