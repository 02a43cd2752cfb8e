"""What a saved adapter of the lab's methods holds beside its trained tensors, and the checks when it is loaded.

Two small tensors for the whole file: a checksum of its contents, and, for methods whose frozen tensors are made
again from the base's weights, a fingerprint of these (three half-precision numbers a layer). Another base, or a
basis that does not reproduce, is an error, not a silently wrong picture.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes

from lab import counter
from lab.errors import LabError
from lab.methods._layer import OwnLayer

TOLERANCE = 0.02  # of a fingerprint's numbers, which are of order one; half precision keeps them to 0.001


def check_readable(folder: Path) -> None:
    """Raise LabError when the folder has an adapter file whose header does not parse or promises more than is there."""
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # another format, or a repository that is not here yet
        return
    try:
        with safe_open(str(file), "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise LabError(f"{file} is damaged or incomplete: {error}.") from None


def layers_of(model: Any, adapter: str) -> dict[str, OwnLayer]:
    """Layers that carry the adapter, by their names in the state dict, sorted."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, OwnLayer) and adapter in m.methods}
    return dict(sorted(found.items()))


def seal(
    tuner: Any, model: Any, config: Any, adapter: str, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapter's trained tensors, with frozen ones where they are stored, fingerprint and checksum."""
    layers = layers_of(model, adapter)
    knobs, method = config.knobs(), tuner.method
    if method.packs(knobs):
        tensors = {f"{tuner.prefix}packed_{k}": v for k, v in method.pack(tensors, knobs).items()}
    if config.stored:
        for name, layer in layers.items():
            for key, value in layer.frozen(adapter).items():
                tensors[f"{name}.{tuner.prefix}{key}.{adapter}"] = value
    elif derived := method.derived(knobs):
        tensors[f"{tuner.prefix}fingerprint"] = fingerprint(layers, adapter, derived)
    plain = {tuner._remove_adapter_name_from_key(k, adapter): v for k, v in tensors.items()}
    tensors[f"{tuner.prefix}checksum"] = checksum(plain)
    return tensors


def open_sealed(
    tuner: Any, config: Any, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a file into the adapter's tensors and the lab's extras, after checking its checksum."""
    names = (f"{tuner.prefix}fingerprint", f"{tuner.prefix}checksum")
    content = {k: v for k, v in state.items() if not k.endswith(names)}
    extras = {n: v for n in names for k, v in state.items() if k.endswith(n)}
    given = extras.get(names[1])
    sealed = content | ({names[0]: extras[names[0]]} if names[0] in extras else {})
    if given is None or not torch.equal(given.cpu(), checksum(sealed)):
        raise LabError("The adapter file's checksum does not fit its contents: it was damaged or changed after saving.")
    return content, extras


def check(
    tuner: Any, model: Any, config: Any, adapter: str, mapped: dict[str, torch.Tensor], extras: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Check a file against the model it is loaded into, and put stored frozen tensors in their places."""
    layers = layers_of(model, adapter)
    own = model.state_dict()
    wanted = {k for p in _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter) for k in (p,) if k in own}
    for key in sorted(wanted):
        if key not in mapped:
            raise LabError(f"The adapter file lacks {key.removesuffix('.' + adapter)}: it was made for another model.")
        if mapped[key].shape != own[key].shape:
            given, fits = (" × ".join(map(str, s)) for s in (mapped[key].shape, own[key].shape))
            raise LabError(
                f"The adapter file's {key} is {given}, this model needs {fits}: it was made for another base."
            )
        if not bool(torch.isfinite(mapped[key]).all()):
            raise LabError(f"The adapter file's {key} holds NaN or infinity.")
    if config.stored:
        _restore(tuner, layers, adapter, mapped)
    elif derived := tuner.method.derived(config.knobs()):
        _compare(layers, adapter, derived, extras.get(f"{tuner.prefix}fingerprint"))
    return mapped


def _restore(tuner: Any, layers: dict[str, OwnLayer], adapter: str, mapped: dict[str, torch.Tensor]) -> None:
    for name, layer in layers.items():
        for key, place in layer.frozen(adapter).items():
            plain = f"{name}.{tuner.prefix}{key}"
            value = mapped.pop(plain, mapped.pop("base_model.model." + plain, None))
            if value is None or value.shape != place.shape:
                raise LabError(f"The adapter file lacks the {key} of layer {name}, or has it in another shape.")
            with torch.no_grad():
                place.copy_(value)


def _compare(layers: dict[str, OwnLayer], adapter: str, derived: tuple[str, ...], given: Any) -> None:
    here = fingerprint(layers, adapter, derived)
    if given is None or given.shape != here.shape:
        raise LabError("The adapter file has no fingerprint of the base it was trained on, or one of another model.")
    off = (given.cpu().float() - here.float()).abs().amax(dim=1)
    if bool((off > TOLERANCE).any()):
        worst = list(layers.values())[int(off.argmax())]
        raise LabError(
            f"This adapter was trained on another base: layer {worst.layer.name} does not give the frozen tensors it was"
            " trained with. Load its own base in the precision it was trained in, or save with the frozen tensors stored."
        )


def unpacked(tuner: Any, model: Any, config: Any, adapter: str, content: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A packed file's contents as the adapter's trained tensors; any other file's as they are."""
    knobs, start = config.knobs(), f"{tuner.prefix}packed_"
    if not tuner.method.packs(knobs):
        return content
    packed = {k.rpartition(start)[2]: v for k, v in content.items() if start in k}
    shapes = {}
    for name, layer in layers_of(model, adapter).items():
        for attribute in layer.adapter_layer_names:
            shapes[f"{name}.{attribute}"] = tuple(getattr(layer, attribute)[adapter].shape)
    return {k: v for k, v in content.items() if start not in k} | tuner.method.unpack(packed, shapes, knobs)


def checksum(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """SHA-256 of names, dtypes, shapes and bytes, as 32 bytes."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8)


def fingerprint(layers: dict[str, OwnLayer], adapter: str, derived: tuple[str, ...]) -> torch.Tensor:
    """(layers, 3) half-precision numbers: two random projections of the normalised tensors, and the log of their norm.

    A projection is gᵀ·T·h/‖T‖ with random signs g, h: of order one for unrelated matrices, and moved by 1/√r when two
    of r columns change places.
    """
    rows = []
    for layer in layers.values():
        row = torch.zeros(3, dtype=torch.float64)
        for i, name in enumerate(derived):
            value = layer.frozen(adapter)[name].detach()
            matrix = value.reshape(value.shape[0], -1).float()
            norm = matrix.norm().clamp_min(1e-30)
            for draw in (0, 1):
                g, h = (_signs(size, 2 * i + draw, str(matrix.device)) for size in matrix.shape)
                row[draw] += float((g @ matrix @ h) / norm)
            row[2] += float(norm.log())
        rows.append(row)
    return torch.stack(rows).half()


@functools.lru_cache(maxsize=64)
def _signs(size: int, stream: int, device: str) -> torch.Tensor:
    return counter.signs(counter.key("fingerprint", size), stream, size, device)
