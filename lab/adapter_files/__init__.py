"""Adapter files of every layout that is around, opened without running anything in them.

    file = read("fox.safetensors")
    file.updates["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"].factors()

Opens PEFT folders (the lab's own methods' and PEFT's), zips of them, diffusers' LoRA files, kohya's and LyCORIS' (LoRA,
LoCon, LoHa, LoKr, DoRA, full differences), UNet and text encoders. Headers are checked before a tensor is read, and
tensors are read when a layer is asked for, so memory holds one layer at a time. Only safetensors: a pickle is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import base_weights
from lab.adapter_files import _family, _header, _names, _settings
from lab.adapter_files._family import FAMILIES, Family
from lab.adapter_files._header import MAX_BYTES, name_of, refuse_pickle, short
from lab.adapter_files._updates import Layer, Update, decomposed, update
from lab.adapter_files._zip import CONFIG, WEIGHTS, unpack
from lab.bases import Base, resolve
from lab.errors import LabError

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 5000  # SDXL with both text encoders has 1,100, LLaMA-2 70B 560

__all__ = [
    "CONFIG",
    "FAMILIES",
    "MAX_BYTES",
    "WEIGHTS",
    "AdapterFile",
    "Family",
    "Update",
    "check_file",
    "read",
    "refuse_pickle",
    "unpack",
]


@dataclass
class AdapterFile:
    """What was opened.

    format: "diffusers", "kohya", "peft" (PEFT's and the lab's folders) or "plain" (bare layer names)
    kinds: lora, loha, lokr, dora, full, or another PEFT method's name in lower case, most frequent first
    alpha: the scale's numerator where all layers share it
    base: the base at hand that it fits: given, or named by the file, or told by the layers; None when there is none
    parameters: numbers stored for the layers; bytes: size of the weights' file
    notes: sentences on what was left out
    """

    name: str
    format: str
    kinds: tuple[str, ...]
    updates: dict[str, Update]
    alpha: float | None
    metadata: dict[str, str]
    family: Family
    base: Base | None
    parameters: int
    bytes: int
    notes: list[str] = field(default_factory=list)
    keep: Any = field(default=None, repr=False)  # what must live as long as the updates: a folder, a network

    @property
    def kind(self) -> str:
        return self.kinds[0]

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest bound on a layer's rank."""
        ranks = [u.rank for u in self.updates.values()]
        return min(ranks), max(ranks)

    @property
    def rank(self) -> int:
        return self.ranks[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: u.shape for name, u in self.updates.items()}


def read(path: str | Path, base: str | Base | None = None, *, name: str | None = None) -> AdapterFile:
    """Open a .safetensors file, a PEFT folder, or a zip of either.

    base: the base model it is laid on, by id, folder or Hub id, or its row; needed for methods whose update depends on
        the base's weights (DoRA, NoRA, LoRA-XS, OFT, …). Without one, the base that the file names, or that its layers
        tell, is taken if it is registered and at hand.
    name: how messages call the file (default: its own name)

    Raises LabError, in one sentence, for whatever is wrong with it, and when it does not fit a base that was given.
    """
    path = Path(path)
    row = resolve(base) if isinstance(base, str) else base
    if path.is_dir():
        folder = path.resolve()
        return _from_folder(path, row, name or (folder.parent.name if folder.name == "adapter" else folder.name))
    refuse_pickle(name or path.name, name_of(path, name))
    if (name or path.name).lower().endswith(".zip"):
        return _from_zip(path, row, name)
    return _from_file(path, row, name)


def check_file(path: Path, name: str | None = None, *, configured: bool = False) -> None:
    """Check a file's header and, unless a configuration says what it is, that its tensors are an adapter's. Without
    torch, and without reading a tensor. Raises LabError, one sentence."""
    file = _header.opened(path, name)
    if not configured:
        _stems(file)


def _from_zip(path: Path, row: Base | None, name: str | None) -> AdapterFile:
    import tempfile

    if not path.is_file():
        raise LabError(f"{name_of(path, name)} is not there.")
    folder = tempfile.TemporaryDirectory(prefix="lab-adapter-")
    found = read(unpack(path, Path(folder.name), name), row, name=(name or path.name)[:-4])
    found.keep = (found.keep, folder)
    return found


def _from_folder(folder: Path, row: Base | None, name: str) -> AdapterFile:
    from lab.methods import adapters

    if not (folder / CONFIG).is_file():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise LabError(
                f"{name_of(folder, name)} has no {CONFIG} and {len(files)} .safetensors files: name one file."
            )
        return _from_file(files[0], row, name)
    if not (folder / WEIGHTS).is_file():
        pickled = any((folder / f"adapter_model{end}").is_file() for end in _header.PICKLES)
        if pickled:
            refuse_pickle("adapter_model.bin", f"{name_of(folder, name)}'s adapter_model.bin")
        raise LabError(f"{name_of(folder, name)} has no {WEIGHTS}.")
    if (folder / CONFIG).stat().st_size > 1 << 20:
        raise LabError(
            f"{name_of(folder, name)} has a configuration of more than 1 MiB: an adapter's has some kilobytes."
        )
    try:
        given = adapters.settings(folder)
    except (LabError, RecursionError):
        raise LabError(
            f"{name_of(folder, name)} has an {CONFIG} that does not say which kind of adapter it is."
        ) from None
    settings = _settings.Settings(given)
    row = row or _family.base_named(str(given.get("base_model_name_or_path") or ""))
    if settings.plain:
        return _from_file(folder / WEIGHTS, row, name, settings)
    from lab.adapter_files import _network

    return _network.read(folder, row, name, settings)


def _from_file(
    path: Path, row: Base | None, name: str | None, settings: _settings.Settings | None = None
) -> AdapterFile:
    file = _header.opened(path, name)
    named = row or _family.base_named(file.metadata.get("ss_sd_model_name", ""))
    stems, unread = _stems(file)
    layers = _layers(file, stems, named)
    header = _settings.of_header(file.metadata)
    updates, alphas = {}, set()
    for layer in layers.values():
        made, alpha = _update(layer, settings or header.get(_part(layer.name)))
        updates[layer.name] = made
        alphas.add(alpha)
    shapes = {n: u.shape for n, u in updates.items()}
    base = _fitting(file.called, shapes, row, named)
    _decompose(file, layers, updates, base)
    if base is not None:
        _shape(updates, base_weights.weights(base).layers())
    kinds = [("dora" if u.dora else u.kind) for u in updates.values()]
    layouts = [_names.layout(stem) for stem in stems]
    return AdapterFile(
        name=(name or path.name).removesuffix(".safetensors"),
        format="peft" if settings else max(set(layouts), key=layouts.count),
        kinds=tuple(sorted(set(kinds), key=lambda k: (-kinds.count(k), k))),
        updates=updates,
        alpha=alphas.pop() if len(alphas) == 1 else None,
        metadata=_settings.shown(file.metadata) | _of_settings(settings),
        family=_family.guess(shapes),
        base=base,
        parameters=sum(file.entries[k].numel for x in layers.values() for p, k in x.keys.items() if p != "alpha"),
        bytes=file.bytes,
        notes=_notes(unread, settings),
    )


def _stems(file: _header.TensorFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names without their endings → {what: key}, and the keys that are none of an adapter's."""
    stems: dict[str, dict[str, str]] = {}
    unread = []
    for key in file.entries:
        found = _names.split(key)
        if found is None:
            unread.append(key)
            continue
        stem, part = found
        if part in stems.setdefault(stem, {}):
            raise LabError(f"{file.called} names {part} of layer {short(stem)} twice.")
        stems[stem][part] = key
    for stem in [s for s, parts in stems.items() if set(parts) == {"alpha"}]:
        unread.append(stems.pop(stem)["alpha"])
    if not stems:
        whole = sum(k.endswith(".weight") for k in unread) > 100
        what = "it looks like a whole model" if whole else "its tensors are called " + short(unread[0])
        raise LabError(f"{file.called} is no adapter that the lab reads: {what}.")
    if len(stems) > MAX_LAYERS:
        raise LabError(
            f"{file.called} changes {len(stems):,} layers: at most {MAX_LAYERS:,} are read; no model has more."
        )
    return stems, unread


def _layers(file: _header.TensorFile, stems: dict[str, dict[str, str]], row: Base | None) -> dict[str, Layer]:
    """Layers by the names of the base. Where names count blocks and nothing says how many layers a block has, the number
    that gives layers of a known network's widths."""
    counting = any(_names.counts_blocks(stem) for stem in stems)
    told = _family.layers_a_block(row) if counting else 2
    tries = [_named(file, stems, n) for n in ([told] if told else (2, 1))]
    if len(tries) == 1:
        return tries[0]
    return max(tries, key=_likeness)


def _named(file: _header.TensorFile, stems: dict[str, dict[str, str]], layers_a_block: int) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for stem, keys in stems.items():
        name = _names.layer(stem, layers_a_block)
        if not re.fullmatch(r"[\w.:/-]+", name, re.ASCII):
            raise LabError(f"{file.called} names a layer {short(stem)!r}, in letters that no layer's name has.")
        if name in found:
            raise LabError(f"{file.called} changes layer {short(name)} twice, under two names.")
        found[name] = Layer(file, name, keys)
    return found


def _likeness(layers: dict[str, Layer]) -> int:
    """How many layers a shipped network has under these names in these widths."""
    shapes = {name: update(layer, None).shape for name, layer in layers.items()}
    known = _family.table(id) if (id := _family.guess(shapes).id) in ("tiny-sdxl", "sdxl-unet", "sd15-unet") else {}
    return sum(name in known and _family.same(shape, known[name]) for name, shape in shapes.items())


def _update(layer: Layer, settings: _settings.Settings | None) -> tuple[Update, float | None]:
    """The update, without its magnitude, and its alpha."""
    alpha, rank = layer.alpha(), None
    if alpha is None and settings is not None:
        inner = layer.name.removeprefix(f"{_part(layer.name)}.")
        alpha, rank = settings.alpha(inner), settings.rank(inner)
    return update(layer, alpha, rank, bool(settings and settings.rs)), alpha


def _part(layer: str) -> str:
    return next((p for p in ("text_encoder_2", "text_encoder") if layer.startswith(f"{p}.")), "unet")


def _fitting(called: str, shapes: dict[str, tuple[int, ...]], given: Base | None, named: Base | None) -> Base | None:
    """The base to use: the given one, which must fit, else the one that is named or guessed, if it is at hand and fits."""
    if given is not None:
        _family.check(called, shapes, base_weights.weights(given).layers(), given)
        return given
    if named is None:
        from lab.bases import BASES

        id = _family.guess(shapes).base
        named = BASES[id] if id else None
    if named is None or not base_weights.at_hand(named):
        return None
    try:
        _family.check(called, shapes, base_weights.weights(named).layers(), named)
    except LabError:
        return None
    return named


def _decompose(
    file: _header.TensorFile, layers: dict[str, Layer], updates: dict[str, Update], base: Base | None
) -> None:
    """Turn layers with a magnitude into DoRA's update of the base's weight."""

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def weight() -> torch.Tensor:
            if base is None:
                raise LabError(f"{file.called} is a DoRA, whose update depends on the base's weights: choose its base.")
            return base_weights.weights(base).get(name)

        return weight

    for name, layer in layers.items():
        if "magnitude" in layer.keys or "dora_scale" in layer.keys:
            updates[name] = decomposed(layer, updates[name], reader(name))


def _shape(updates: dict[str, Update], base: dict[str, tuple[int, ...]]) -> None:
    """Give convolutions back the kernel that LoHa and LoKr files fold into their inputs."""

    def shaped(made: Update, shape: tuple[int, ...]) -> Update:
        return replace(made, shape=shape, dense=lambda: made.dense().reshape(shape))

    for name, made in updates.items():
        if made.shape != base[name]:
            updates[name] = shaped(made, base[name])


def _of_settings(settings: _settings.Settings | None) -> dict[str, str]:
    wanted = ("base_model_name_or_path", "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "init_lora_weights")
    given = settings.given if settings else {}
    found = {k: str(given[k])[:200] for k in wanted if given.get(k) not in (None, "", False)}
    if "/" in (base := found.get("base_model_name_or_path", "")) and base.count("/") != 1:
        found["base_model_name_or_path"] = Path(base).name  # a folder of somebody's machine
    return found


def _notes(unread: list[str], settings: _settings.Settings | None) -> list[str]:
    notes = []
    if unread:
        notes.append(
            f"{len(unread)} tensors are no change of a linear or convolution weight (biases, norms, embeddings or a kind "
            f"that the lab does not know) and are left out, as {short(unread[0])}."
        )
    start = str(settings.given.get("init_lora_weights", "")) if settings else ""
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "eva")) and not start.startswith("eva"):
        notes.append(
            f"It started from {start}, which moves the base's weights first: ΔW is what was added to those moved weights."
        )
    return notes
