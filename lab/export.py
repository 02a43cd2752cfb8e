"""Adapters as files that other programs read: diffusers LoRA, kohya LoRA (ComfyUI, A1111, Forge), PEFT, merged UNet.

Whatever the method, what leaves is ΔW = B·A for each layer, all scales folded in, alpha = rank, so that no reader can
scale it wrongly. Exact where the update is of low rank; otherwise a truncated SVD, with the error said. All layers get
the largest layer's rank, smaller ones padded with zeros, because some readers take one rank for the whole file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.kohya import in_text_model, kohya_name

if TYPE_CHECKING:
    import torch

    from lab.bases import Base

FORMATS = ("diffusers", "kohya", "peft", "merged")
TRUNCATED_RANK = 32  # of updates that are not of low rank


@dataclass
class Factors:
    """ΔW ≈ B·A of every layer: B (m, R), A (R, n) float32, kernels' shapes, and ‖error‖/‖ΔW‖ over all layers."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # by the layers' names in the adapter, see `part_of`
    kernels: dict[str, tuple[int, int]]
    rank: int
    relative_error: float


def export(
    adapter: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    half: bool = False,
) -> dict[str, Any]:
    """Write a saved adapter in another layout. Returns {"files": [...], "relative_error": ‖error‖/‖ΔW‖}.

    out: a folder, or a file name ending in .safetensors where the layout is one file
    base: id, folder or Hub id of the base; default: the one the adapter's configuration names
    rank: of the truncated SVD where the update is not of low rank (default 32, or less on smaller layers)
    half: store fp16 in place of fp32; the error then includes the rounding

    Raises LabError on an unknown layout, a folder that is no adapter, an adapter that is no change of weights, or a
    base that it does not fit.
    """
    from lab.methods import adapters

    if to not in FORMATS:
        raise LabError(f"Unknown layout '{to}': choose one of {', '.join(FORMATS)}.")
    folder, out = Path(adapter), Path(out)
    settings = adapters.settings(folder)
    if to == "peft" and not _ours(settings["peft_type"]):
        return {"files": _copied(folder, out), "relative_error": 0.0}
    row = _base_of(folder, settings, base)
    if row.family != "sdxl" and to in ("diffusers", "kohya"):
        raise LabError(
            f"The {to} layout is for Stable Diffusion XL adapters; this one is for {row.name}: export it as peft."
        )
    import torch

    with torch.no_grad():
        model = _loaded(row, folder, settings)
        try:
            if to == "merged":
                _widen(row, model)
                return {"files": _merged(model, out), "relative_error": 0.0}
            factors = factorise(model, rank, half)
        finally:
            model.unload()
    write = {"diffusers": _write_diffusers, "kohya": _write_kohya, "peft": _write_peft}[to]
    return {"files": write(factors, out, row, folder), "relative_error": factors.relative_error}


def factorise(model: Any, rank: int | None = None, half: bool = False) -> Factors:
    """Factors of every layer's ΔW, padded to one rank, and their measured error."""
    import torch

    from lab.methods.deltas import deltas

    name = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
    pairs, kernels, wrong, total = {}, {}, 0.0, 0.0
    for layer, delta in deltas(model, name).items():  # one dense update at a time: SDXL's together are gigabytes
        full = delta.dense().float()
        if full.dim() == 4:
            kernels[layer] = (full.shape[2], full.shape[3])
        full = full.flatten(1)
        found = delta.factors()
        B, A = found if found is not None else _truncated(full, rank or TRUNCATED_RANK)
        pairs[layer] = (B.half(), A.half()) if half else (B.float(), A.float())
        B, A = pairs[layer]
        wrong += float((B.double() @ A.double() - full.double()).square().sum())
        total += float(full.double().square().sum())
    if not total:
        raise LabError(
            "This adapter changes no weight (it is untrained, or trains biases only): there is nothing to export."
        )
    widest = max(A.shape[0] for _, A in pairs.values())
    pad = torch.nn.functional.pad
    pairs = {
        layer: (pad(B, (0, widest - B.shape[1])), pad(A, (0, 0, 0, widest - A.shape[0])))
        for layer, (B, A) in pairs.items()
    }
    return Factors(pairs, kernels, widest, (wrong / total) ** 0.5)


def _truncated(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of ΔW (m, n) of at most this rank, its scale split evenly over both factors."""
    import torch

    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    r = min(rank, S.numel())
    root = S[:r].sqrt()
    return (U[:, :r] * root).float(), (root[:, None] * Vh[:r]).float()


# -- reading --------------------------------------------------------------------------------------------
def _ours(kind: str) -> bool:
    from lab.methods import METHODS
    from lab.methods.own import OwnMethod

    return any(isinstance(m, OwnMethod) and m.peft_name.upper() == kind for m in METHODS)


def _base_of(folder: Path, settings: dict[str, Any], given: str | None) -> Base:
    from lab.bases import resolve

    name = given or settings.get("base_model_name_or_path")
    if not name:
        raise LabError(f"{folder} does not say which base it was trained on: name it with --base.")
    return resolve(name)


def _loaded(row: Base, folder: Path, settings: dict[str, Any]) -> Any:
    """The base's network with the adapter on it, on the CPU, so that exports do not depend on the machine: W as it was
    held in training, then in float32 wherever the update's numbers depend on its precision."""
    import torch

    from lab import networks
    from lab.device import WEIGHTS
    from lab.methods import adapters

    whole = row.load("cpu", WEIGHTS.get(_run(folder).get("weights", ""), torch.float32))
    network = networks.network(whole, networks.adapts_text(settings)) if row.family == "sdxl" else whole.model
    plain = settings["peft_type"] == "LORA" and not settings.get("use_dora")
    plain = plain and settings.get("init_lora_weights") in (True, False, "gaussian")
    if not plain and not _ours(settings["peft_type"]):
        _widen(row, network)
    return adapters.load(network, folder).eval()


def _widen(row: Base, network: torch.nn.Module) -> None:
    import torch

    if next(network.parameters()).dtype != torch.float32:
        network.float()
        row.forget()  # what is kept of the base is no longer what its next user asks for


def part_of(layer: str) -> tuple[str, str]:
    """("text_encoder", "encoder.layers.0…") of an adapter's layer: an adapter of the UNet alone names no part."""
    part, _, inner = layer.partition(".")
    return (part, inner) if part in ("unet", "text_encoder", "text_encoder_2") else ("unet", layer)


def _by_part(factors: Factors) -> dict[str, list[str]]:
    """The names of each part's layers."""
    parts: dict[str, list[str]] = {}
    for layer in factors.pairs:
        parts.setdefault(part_of(layer)[0], []).append(layer)
    return parts


def _run(folder: Path) -> dict[str, Any]:
    """The record of the run that the adapter came from, where it stands beside it."""
    try:
        found = json.loads((folder.parent / "meta.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _trigger(folder: Path) -> dict[str, str]:
    """Trigger and class word of that run."""
    spec = _run(folder).get("spec")
    return {key: str(spec.get(key, "")) if isinstance(spec, dict) else "" for key in ("trigger", "class_word")}


# -- writing --------------------------------------------------------------------------------------------
def _file(out: Path, default: str) -> Path:
    path = out if out.suffix == ".safetensors" else out / default
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _kernel_shaped(factors: Factors, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (R, in[, kh, kw]), up (out, R[, 1, 1])) as LoRA files hold them."""
    B, A = factors.pairs[layer]
    if layer not in factors.kernels:
        return A.contiguous(), B.contiguous()
    kh, kw = factors.kernels[layer]
    return A.reshape(A.shape[0], -1, kh, kw).contiguous(), B[:, :, None, None].contiguous()


def _lora_config(factors: Factors, layers: list[str], base: str | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=factors.rank,
        lora_alpha=factors.rank,
        target_modules=sorted(layers),
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _plain(config: Any) -> dict[str, Any]:
    """A PEFT configuration as JSON would have it."""
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return {k: getattr(v, "value", v) for k, v in values.items()}


def _write_diffusers(factors: Factors, out: Path, row: Base, folder: Path) -> list[str]:
    from safetensors.torch import save_file

    tensors, metadata = {}, {}
    for part, layers in _by_part(factors).items():
        names = {layer: _inner(layer) for layer in layers}
        for layer, name in names.items():
            key = f"{part}.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = _kernel_shaped(factors, layer)
        # PEFT finds layers by how their names end: so these fit either transformers' naming of text encoders.
        ends = [name.removeprefix("text_model.") for name in names.values()]
        metadata |= {f"{part}.{k}": v for k, v in _plain(_lora_config(factors, ends)).items()}
    path = _file(out, "pytorch_lora_weights.safetensors")
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)})
    return [str(path)]


def _inner(layer: str) -> str:
    """A layer's name in its part, as files have it."""
    part, inner = part_of(layer)
    return inner if part == "unet" else in_text_model(inner)


def _write_kohya(factors: Factors, out: Path, row: Base, folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save, save_file

    layers_a_block = 2  # SDXL's own
    if (Path(row.source) / "unet" / "config.json").is_file():
        layers_a_block = json.loads((Path(row.source) / "unet" / "config.json").read_text())["layers_per_block"]
    tensors = {}
    for layer in factors.pairs:
        name = kohya_name(layer, layers_a_block)
        down, up = _kernel_shaped(factors, layer)
        alpha = torch.tensor(float(factors.rank), dtype=down.dtype)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    plain = save(tensors)
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    words, path = _trigger(folder), _file(out, f"{folder.name}.safetensors")
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(factors.rank),
        "ss_network_alpha": str(float(factors.rank)),
        "ss_output_name": path.stem,
        "ss_sd_model_name": row.name,
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{row.resolution}x{row.resolution}",
        "modelspec.trigger_phrase": f"{words['trigger']} {words['class_word']}".strip(),
    }
    save_file(tensors, path, metadata)
    return [str(path)]


def _write_peft(factors: Factors, out: Path, row: Base, folder: Path) -> list[str]:
    """The update as a plain LoRA folder, which PEFT reads without the lab; one for each part where it is more than the
    UNet's (`unet`, `text_encoder`, `text_encoder_2`)."""
    from safetensors.torch import save_file

    files, parts = [], _by_part(factors)
    for part, layers in parts.items():
        target = out / part if len(parts) > 1 else out
        target.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer in layers:
            key = f"base_model.model.{part_of(layer)[1]}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = _kernel_shaped(factors, layer)
        weights, config = target / "adapter_model.safetensors", target / "adapter_config.json"
        save_file(tensors, weights, {"format": "pt"})
        names = [part_of(layer)[1] for layer in layers]
        config.write_text(json.dumps(_plain(_lora_config(factors, names, row.id)), indent=2, sort_keys=True))
        files += [str(weights), str(config)]
    return files


def _copied(folder: Path, out: Path) -> list[str]:
    """A folder that is plain PEFT already."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / name).is_file():
            raise LabError(f"{folder} has no {name}.")
        files.append(str(shutil.copyfile(folder / name, out / name)))
    return files


def _merged(model: Any, out: Path) -> list[str]:
    """The base's network with the update added to its weights, in its own folder layout; text encoders that the adapter
    changes beside it, each part in a folder of its own."""
    from safetensors.torch import save_file

    from lab.networks import ENCODERS, Networks

    model.merge_adapter(safe_merge=True)
    inner, prefix, files = model.base_model.model, model.base_model.prefix, []
    whole = isinstance(inner, Networks)
    for part, network in [(p, getattr(inner, p)) for p in ("unet", *ENCODERS)] if whole else [("", inner)]:
        state = {n.replace(".base_layer.", "."): v for n, v in network.state_dict().items()}
        state = {n: v.contiguous() for n, v in state.items() if not any(w.startswith(prefix) for w in n.split("."))}
        default = "model.safetensors" if part in ENCODERS else "diffusion_pytorch_model.safetensors"
        path = _file(out / part if whole else out, default)
        save_file(state, path, {"format": "pt"})
        files.append(str(path))
        if path.name == default and hasattr(network, "save_config"):
            network.save_config(path.parent)
        elif part in ENCODERS:
            network.config.save_pretrained(path.parent)
        if (path.parent / "config.json").is_file() and path.name == default:
            files.append(str(path.parent / "config.json"))
    model.unmerge_adapter()
    return files
