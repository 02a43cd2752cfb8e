"""The last base loaded, and making a used one what it was when it was loaded.

Runs in one process share it: adapters come and go, W never changes. A process that does the runs of several attempts
one after another (lab/jobs/resident.py) trusts nobody for that: it sets `sealing`, so that what a base is like is
written down when it has been read, and calls `settle` between two runs. That puts back whatever a run left on the
base, then compares every tensor with what was read; a base that differs in one bit is dropped and read again.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

sealing: bool = False  # whether this process calls `settle`
CHUNK = 2**25  # bytes that are summed at once, a multiple of 8
PLAIN = (dict, OrderedDict, list, set)  # what is put back entry by entry; of every other value, which one it was
STATELESS = (torch.nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)  # or written down anyway


@dataclass
class _Kept:
    key: Any
    model: Any
    seal: Seal | None
    lent: bool = False  # since it was read, or settled


_kept: list[_Kept] = []  # one at most


def lend(key: Any, read: Callable[[], Any], *, shared: bool = True) -> Any:
    """The kept base if it is `key`'s, else what `read()` gives, which is then kept in its place.

    shared: whoever asks in the same run gets the very same. Otherwise everybody gets one of their own, and only the
    first of a run the kept one, where there is settling between runs.
    """
    if not shared and (not sealing or (_kept and _kept[0].key == key and _kept[0].lent)):
        return read()
    if not _kept or _kept[0].key != key:
        forget()  # first: memory may not hold two
        model = read()
        _kept[:] = [_Kept(key, model, Seal(model) if sealing else None)]
    _kept[0].lent = True
    return _kept[0].model


def find(fits: Callable[[Any], bool]) -> Any:
    """The kept base if its key fits, else None."""
    return next((kept.model for kept in _kept if fits(kept.key)), None)


def forget() -> None:
    """Let go of it."""
    if _kept:
        _kept.clear()
        gc.collect()  # modules and hooks point at one another


def stamp(source: str) -> Any:
    """Changes when the files of a local base do; None where nobody settles, and for what lies in the Hub's cache."""
    path = Path(source)
    if not sealing or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(path.glob("**/*"))
    return tuple((str(f), s.st_size, s.st_mtime_ns) for f in files if (s := f.stat()) and f.is_file())


def settle() -> str:
    """Between two runs: the base is afterwards as it was read, or is dropped. Says why it was, "" where it was not."""
    if not _kept:
        return ""
    kept = _kept[0]
    try:
        why = kept.seal.restore() if kept.seal else "it was not sealed"
    except Exception as error:  # whatever a run did to it: reading it again is always right
        why = f"{type(error).__name__}: {error}"
    if why:
        forget()
    kept.lent = False
    return why


def held_bytes(device_type: str) -> int:
    """Bytes of the kept base's tensors on devices of this type ("cuda")."""
    tensors = _kept[0].seal.tensors if _kept and _kept[0].seal else []
    return sum(t.untyped_storage().nbytes() for t in tensors if t.device.type == device_type)


class Seal:
    """What a model was like: of the model, its modules, tensors, and the objects that stand on them (configurations,
    schedulers, attention processors), each attribute; and every tensor's bits."""

    def __init__(self, model: Any) -> None:
        self._things: list[tuple[Any, type, dict[str, Any]]] = []
        seen: set[int] = set()
        for thing in (model, *_modules(model)):
            self._write_down(thing, seen)
        for value in self._values():  # one step further: deeper than that, nothing of a base changes
            if hasattr(value, "__dict__") and not isinstance(value, STATELESS):
                self._write_down(value, seen)
        self.tensors = list({id(t): t for t in self._values() if isinstance(t, torch.Tensor)}.values())
        self._shapes = [(t.device, t.dtype, t.shape, t.requires_grad) for t in self.tensors]
        self._prints = fingerprints(self.tensors)

    def _values(self) -> list[Any]:
        """The attributes of everything written down, of a list or dict what is in it."""
        return [v for _, _, values in self._things for entry in values.values() for v in _flat(entry)]

    def _write_down(self, thing: Any, seen: set[int]) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        values = {name: (value, _contents(value)) for name, value in vars(thing).items()}
        self._things.append((thing, type(thing), values))

    def restore(self) -> str:
        """Put every attribute back as it was; "" when every tensor is what it was, else what is not."""
        for thing, kind, values in self._things:
            if type(thing) is not kind:
                return f"a {kind.__name__} became a {type(thing).__name__}"
            here = vars(thing)
            for name in here.keys() - values.keys():
                del here[name]
            for name, (value, contents) in values.items():
                here[name] = value
                if contents is not None:
                    _refill(value, contents)
        for tensor, (device, dtype, shape, trained) in zip(self.tensors, self._shapes, strict=True):
            if tensor.dtype != dtype or tensor.shape != shape:
                return f"a tensor of {tuple(shape)}, {dtype}, became one of {tuple(tensor.shape)}, {tensor.dtype}"
            if tensor._backward_hooks:
                return "a tensor has hooks"
            tensor.grad = None
            tensor.requires_grad_(trained)
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        changed = sum(a != b for a, b in zip(fingerprints(self.tensors), self._prints, strict=True))
        return f"{changed} of its tensors changed" if changed else ""


def _modules(model: Any) -> list[torch.nn.Module]:
    """Every module of a pipeline, or of whatever else holds networks as attributes."""
    parts = [model] if isinstance(model, torch.nn.Module) else list(vars(model).values())
    networks = [part for part in parts if isinstance(part, torch.nn.Module)]
    return list({id(m): m for network in networks for m in network.modules()}.values())


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in PLAIN else None


def _refill(value: Any, contents: Any) -> None:
    if type(value) is list:
        value[:] = contents
    else:
        value.clear()
        value.update(contents)


def _flat(entry: tuple[Any, Any]) -> Iterable[Any]:
    """A value, or what it holds."""
    value, contents = entry
    if contents is None:
        return (value,)
    return contents.values() if isinstance(contents, dict) else contents


@torch.no_grad()
def fingerprints(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A 64-bit number of each tensor's bits: their weighted sum, each weight odd. A change of one entry always changes
    it, a change of several but once in 2⁶⁴. Computed where the tensor lies, waited for once a device."""
    sums = [_sum(tensor) for tensor in tensors]
    found: list[int] = [0] * len(sums)
    for device in {s.device for s in sums}:
        places = [i for i, s in enumerate(sums) if s.device == device]
        for i, number in zip(places, torch.stack([sums[i] for i in places]).tolist(), strict=True):
            found[i] = number
    return found


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().flatten()
    data = (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), CHUNK):
        part = data[start : start + CHUNK]
        missing = -part.numel() % 8
        if missing or part.storage_offset() % 8:
            part = torch.cat([part, part.new_zeros(missing)])
        words, first = part.view(torch.int64), start // 8
        weights = torch.arange(first, first + words.numel(), device=words.device)
        total += weights.mul_(-7046029254386353131).bitwise_or_(1).mul_(words).sum()
    return total
