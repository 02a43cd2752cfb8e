"""What all fits share: checks, attaching, saving, loading what was saved, and measuring it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab import budget as budgets
from lab.compress import FITS, Fit, Plan
from lab.compress._update import Goal, Matrix
from lab.errors import LabError
from lab.methods._layer import OwnLayer, describe
from lab.methods.deltas import Delta, deltas
from lab.methods.spec import Layer

Report = Callable[..., None]
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Place:
    """A layer of the network and the name that adapter files give it."""

    name: str
    given: str


def places(names: Any) -> dict[str, Place]:
    """Where the layers of adapter files lie: with text encoders among them the network is `lab.networks.Networks`, whose
    UNet's layers begin with `unet.`; else it is the UNet, or whatever model, itself.

    Files write `text_model.` in every text encoder's layer; some versions of transformers have it in the first one's
    modules and some have not, which `found` sees to.
    """
    text = reads_text(names)
    inside = {n: n if not text or n.startswith("text_encoder") else f"unet.{n}" for n in names}
    return {n: Place(inside[n], n) for n in names}


def found(place: Place, modules: Mapping[str, torch.nn.Module]) -> Place | None:
    """The place by the name that the network has for it; None when it has no such layer."""
    for name in (place.name, place.name.replace(".text_model.", ".", 1)):
        if name in modules:
            return Place(name, place.given)
    return None


def reads_text(names: Any) -> bool:
    return any(n.startswith(("text_encoder.", "text_encoder_2.")) for n in names)


def compress(
    network: torch.nn.Module,
    updates: Mapping[str, Delta],
    id: str,
    budget: int | None,
    out: Path,
    *,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
    base: str = "",
    report: Report | None = None,
) -> dict[str, Any]:
    """Fit the updates with the method and save it in the folder `out` as its own tuner does.

    updates: layer name, as adapter files have it → ΔW
    network: what they are laid on: the UNet (or any model), or `lab.networks.Networks` when text encoders are among them.
        Left as it was.
    budget: trained numbers over all layers, at most; None: `given` holds the sizes
    given: settings of the method to hold
    base: what the file says it belongs to
    report: told (done, all, phase=…) after every layer; may raise to stop

    Returns method, knobs, how, parameters, budget, relative_error (of what the saved file gives, loaded again), bytes,
    adapter, seconds, left_out, and layers: a record each with layer, m, n, norm, relative_error, rank where ranks differ.
    Raises LabError, in one sentence, on an unknown method, a budget below its floor, settings or layers that do not fit,
    updates that are zero or not finite.
    """
    began, told = time.perf_counter(), report or (lambda *_, **__: None)
    fit = FITS[id]
    goals, norms, left_out = _goals(network, updates, told)
    told(0, len(goals), phase="choosing settings")
    plan = fit.plan(list(goals.values()), budget, dict(given or {}))
    fitted = {given: goal for given, goal in goals.items() if plan.ranks.get(goal.layer.name, 1)}
    _fill_and_save(fit, network, fitted, plan, seed, base, out, told)
    records = _measured(network, goals, norms, out, told)
    for record in records:
        if plan.ranks:
            record["rank"] = plan.ranks[goals[record["layer"]].layer.name]
    whole = sum(r["norm"] ** 2 for r in records)
    lost = sum((r["relative_error"] * r["norm"]) ** 2 for r in records)
    return {
        "method": id,
        "name": fit.method.name,
        "how": fit.how,
        "knobs": budgets.as_dict(plan.knobs),
        "budget": budget,
        "parameters": plan.parameters,
        "relative_error": (lost / whole) ** 0.5,
        "layers": records,
        "left_out": left_out,
        "bytes": sum((out / name).stat().st_size for name in FILES),
        "adapter": str(out),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _goals(
    network: torch.nn.Module, updates: Mapping[str, Delta], told: Report
) -> tuple[dict[str, Goal], dict[str, float], list[str]]:
    """Goals and norms of the layers that change, by the names given, and the layers that do not."""
    if not updates:
        raise LabError("The adapter changes no layer: there is nothing to compress.")
    modules = dict(network.named_modules())
    goals, norms, still = {}, {}, []
    for number, (given, place) in enumerate(places(updates).items()):
        told(number, len(updates), phase="reading the update")
        here = found(place, modules)
        if here is None:
            raise LabError(
                f"The adapter changes layer {given[:120]}, which this base does not have: choose its own base."
            )
        place = here
        goal = Goal(describe(place.name, modules[place.name]), updates[given], modules[place.name])
        _check_shape(goal.layer, given, updates[given])
        norm = goal.matrix().square() ** 0.5
        if not norm < float("inf"):  # NaN too
            raise LabError(f"The update of layer {given[:120]} holds NaN or infinity: the file is damaged.")
        if norm:
            goals[given], norms[given] = goal, norm
        else:
            still.append(given)
    if not goals:
        raise LabError("The adapter changes no weight (it is untrained): there is nothing to compress.")
    return goals, norms, still


def _check_shape(layer: Layer, given: str, delta: Delta) -> None:
    pair = delta.factors()
    entries = pair[0].shape[0] * pair[1].shape[1] if pair is not None else delta.dense().numel()
    rows = pair[0].shape[0] if pair is not None else delta.dense().shape[0]
    if (rows, entries) != (layer.m, layer.m * layer.n):
        raise LabError(
            f"The update of layer {given[:120]} is {rows}×{entries // max(rows, 1)}, the base's weight {layer.m}×{layer.n}: "
            "the adapter was made for another base."
        )


def _fill_and_save(
    fit: Fit, network: Any, goals: Mapping[str, Goal], plan: Plan, seed: int, base: str, out: Path, told: Report
) -> None:
    """Attach the method, give every layer its fitted numbers, save. The network is left as it was."""
    told(0, len(goals), phase="attaching")
    knobs = plan.knobs
    model = fit.attach(network, list(goals.values()), plan, seed)
    try:
        sites = _sites(model)
        if set(sites) != {goal.layer.name for goal in goals.values()}:
            raise LabError(
                "Some layers' names end in others' names here, so they cannot be told apart: nothing was fitted."
            )
        for number, goal in enumerate(goals.values()):
            told(number, len(goals), phase="fitting")
            tensors, settings = sites[goal.layer.name]
            for name, value in fit.solve(
                goal, {k: v.detach().cpu() for k, v in tensors.items()}, settings or knobs
            ).items():
                if not bool(torch.isfinite(value).all()):
                    raise LabError(f"The fit of layer {goal.layer.name} is not finite: choose other settings.")
                tensors[name].data.copy_(value)
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.inference_mode = base, True
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(out), save_embedding_layers=False)
    finally:
        model.unload()


def _sites(model: Any) -> dict[str, tuple[dict[str, torch.Tensor], Any]]:
    """Layer → its tensors by name, and its settings (with the seed), None for PEFT's LoRA."""
    from peft.tuners.lora.layer import LoraLayer

    found: dict[str, tuple[dict[str, torch.Tensor], Any]] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, OwnLayer):
            found[name] = module.tensors("default"), module.knobs["default"]
        elif isinstance(module, LoraLayer):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = {"lora_A": A, "lora_B": B, "scale": torch.tensor(float(module.scaling["default"]))}, None
    return found


def _measured(
    network: Any, goals: Mapping[str, Goal], norms: Mapping[str, float], folder: Path, told: Report
) -> list[dict[str, Any]]:
    """‖fit − ΔW‖/‖ΔW‖ of every layer, of the saved file as anybody loads it."""
    from lab.methods import adapters

    model = adapters.load(network, folder).eval()
    try:
        made = deltas(model)
        records = []
        for number, (given, goal) in enumerate(goals.items()):
            told(number, len(goals), phase="measuring")
            lost = norms[given]
            if goal.layer.name in made:
                fit = Matrix(made[goal.layer.name].dense().detach().double().cpu().reshape(goal.layer.m, goal.layer.n))
                lost = float((fit.full() - goal.matrix().full()).norm())
            records.append(
                {
                    "layer": given,
                    "m": goal.layer.m,
                    "n": goal.layer.n,
                    "norm": norms[given],
                    "relative_error": lost / norms[given],
                }
            )
    finally:
        model.unload()
    return records
