"""Adapters whose update needs the network: every PEFT method that is more than factors in the file.

The adapter is put by PEFT itself on a copy of the base's network that shares its weights: the base stays as it was,
and several adapters are open at once.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lab import base_weights
from lab.adapter_files import AdapterFile, _family, _header, _settings
from lab.adapter_files._updates import Update
from lab.bases import Base
from lab.errors import LabError

if TYPE_CHECKING:
    import torch

NO_WEIGHTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT",
              "CARTRIDGE", "XLORA", "POLY", "TRAINABLE_TOKENS", "LN_TUNING", "BEFT")  # fmt: skip


def read(folder: Path, row: Base | None, name: str, settings: _settings.Settings) -> AdapterFile:
    """A PEFT folder of any method, on the base `row`. Raises LabError when there is no base or it does not fit."""
    from lab.methods import adapters
    from lab.methods.deltas import deltas

    file = _header.opened(folder / "adapter_model.safetensors", name)
    if settings.kind in NO_WEIGHTS or settings.given.get("megatron_config"):
        raise LabError(
            f"{file.called} is a {settings.kind[:40]} adapter, which changes no weights: there is nothing to see."
        )
    if row is None:
        raise LabError(
            f"{file.called} is a {settings.kind[:40]} adapter, whose update depends on the base's weights: choose its base."
        )
    if not base_weights.at_hand(row) and row.family == "sdxl" and "/" in row.source and not Path(row.source).exists():
        raise LabError(f"{file.called} needs the weights of {row.name}, which are not on this machine.")
    network = _shared(_network(row, settings.given))
    try:
        model = adapters.load(network, folder).eval()
    except LabError as problem:
        raise LabError(str(problem).replace(str(folder), file.called)) from None
    updates, inner = {}, cast("Any", model.base_model).model
    for layer, delta in deltas(model).items():
        weight = inner.get_submodule(layer).get_base_layer().weight
        shape = tuple(weight.shape)
        rank = min(shape[0], math.prod(shape[1:]))  # nothing but the update itself bounds most methods
        clean = layer.removeprefix("unet.")
        updates[clean] = Update(delta.dense, delta.factors, shape, rank, settings.kind.lower())
    if not updates:
        raise LabError(f"{file.called} changes no layer of {row.name}.")
    return AdapterFile(
        name=name,
        format="peft",
        kinds=(settings.kind.lower(),),
        updates=updates,
        alpha=None,
        metadata={
            k: str(v)[:200] for k, v in settings.given.items() if k in ("r", "r_outer", "r_inner", "k", "l", "seed")
        },
        family=_family.guess({n: u.shape for n, u in updates.items()}),
        base=row,
        parameters=sum(e.numel for k, e in file.entries.items() if not k.endswith(("checksum", "fingerprint"))),
        bytes=file.bytes,
        keep=model,
    )


def _network(row: Base, given: dict[str, Any]) -> torch.nn.Module:
    import torch

    whole = row.load("cpu", torch.float32)
    if row.family != "sdxl":
        return whole.model
    from lab import networks

    return networks.network(whole, networks.adapts_text(given))


def _shared(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules over the very same tensors."""
    same = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, same)
