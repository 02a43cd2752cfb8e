"""Merge: several adapters, of whatever methods, as one LoRA: a weighted sum of their updates, or what TIES and DARE make of it.

concat: the factors side by side, ΔW = Σ wᵢBᵢAᵢ exactly, of the ranks' sum. svd: the best approximation of that sum of one
rank (Eckart–Young). ties (Yadav et al., NeurIPS 2023, arXiv 2306.01708): each update's largest entries, a sign elected for
each entry, and the mean of those that agree. dare (Yu et al., ICML 2024, arXiv 2311.03099): each update's entries kept at
random with probability `density` and divided by it, then summed. The last two are PEFT's own functions on the whole
updates (its "ties_svd" and "dare_linear_svd"); what they give has full rank, so the file holds its truncated SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError

if TYPE_CHECKING:
    import torch

    from lab.compress._update import Matrix
    from lab.export import Factors
    from lab.methods.deltas import Delta

HOW = {
    "concat": "Exact: factors side by side",
    "svd": "Truncated SVD of the sum",
    "ties": "TIES: largest entries, elected signs",
    "dare": "DARE: entries dropped at random",
}
MAX_ADAPTERS = 8
MAX_RANK = 4096
Updates = Mapping[str, "Delta"]
Report = Callable[..., None]


@dataclass
class Merged:
    """`factors` as the exports take them; a record a layer; errors of the file's update, over all layers: against what the
    rule gives (`relative_error`), and against the plain weighted sum (`from_sum`)."""

    factors: Factors
    layers: list[dict[str, Any]]
    relative_error: float
    from_sum: float


def check(count: int, weights: Sequence[float] | None, how: str, rank: int | None, density: float) -> list[float]:
    """The weights, equal shares of one where none are given. Raises LabError, one sentence, on settings that do not fit."""
    if how not in HOW:
        raise LabError(f"There is no way to merge called '{how[:40]}': choose one of {', '.join(HOW)}.")
    if not 2 <= count <= MAX_ADAPTERS:
        raise LabError(f"2 to {MAX_ADAPTERS} adapters can be merged, got {count}.")
    found = [1 / count] * count if weights is None else [float(w) for w in weights]
    if len(found) != count:
        raise LabError(f"There must be one weight for each adapter: got {len(found)} for {count} adapters.")
    if not all(math.isfinite(w) and abs(w) <= 100 for w in found):
        raise LabError("A weight is a number from -100 to 100.")
    if not any(found):
        raise LabError("All weights are 0: nothing would be left.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise LabError(f"The rank must be a whole number from 1 to {MAX_RANK}, got {rank}.")
    if how == "concat" and rank is not None:
        raise LabError("Concatenation keeps every rank: leave the rank out, or merge with svd.")
    if not 0 < density <= 1:
        raise LabError(f"The density must be above 0 and at most 1, got {density:g}.")
    return found


def merge(
    adapters: Mapping[str, Updates],
    weights: Sequence[float] | None = None,
    how: str = "svd",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    report: Report | None = None,
) -> Merged:
    """Merge adapters, given by name as layer → update; a layer that one of them lacks counts as zero in it.

    rank: of the truncated SVD (default: the largest of the adapters', 32 where one is of full rank)
    density: share of entries that ties and dare keep
    shapes: of the base's weights by layer, where they are known: every layer must be one of them
    report: told (done, all, phase=…) after every layer

    Raises LabError, in one sentence, on settings that do not fit, on layers of different shapes, without a common layer,
    that the base lacks, that are not finite, or, for concat, that have no factors.
    """
    import torch

    from lab.export import Factors

    shares = dict(zip(adapters, check(len(adapters), weights, how, rank, density), strict=True))
    told = report or (lambda *_, **__: None)
    names = _common(adapters)
    pairs, kernels, records = {}, {}, []
    lost, off, whole, summed, came = 0.0, 0.0, 0.0, 0.0, 0.0
    with torch.no_grad():
        for number, layer in enumerate(names):
            told(number, len(names), phase="merging")
            shape, parts = _parts(layer, adapters, shares, shapes)
            total = _sum([x.scaled(w) for w, x in parts])
            goal = total if how in ("concat", "svd") else _by_peft(how, parts, density, seed, layer)
            pair = _factors(layer, goal, how, _rank(rank, parts))
            if len(shape) == 4:
                kernels[layer] = shape[2], shape[3]
            pairs[layer] = pair
            full = goal.full()
            error = float((pair[0].double() @ pair[1].double() - full).square().sum())
            square = float(full.square().sum())
            came += sum(w * w * x.square() for w, x in parts)
            lost, whole = lost + error, whole + square
            if how in ("ties", "dare"):
                plain = total.full()
                off += float((pair[0].double() @ pair[1].double() - plain).square().sum())
                summed += float(plain.square().sum())
            records.append(
                {
                    "layer": layer,
                    "m": shape[0],
                    "n": math.prod(shape[1:]),
                    "norm": square**0.5,
                    "rank": pair[1].shape[0],
                    "relative_error": (error / square) ** 0.5 if square else 0.0,
                }
            )
    if whole <= 1e-24 * came:  # nothing but rounding
        raise LabError("The merged update is zero everywhere: the adapters cancel, or change nothing.")
    relative = (lost / whole) ** 0.5
    from_sum = relative if how in ("concat", "svd") else (off / summed) ** 0.5 if summed else float("inf")
    widest = max(A.shape[0] for _, A in pairs.values())
    return Merged(Factors(_padded(pairs, widest), kernels, widest, relative), records, relative, from_sum)


def save(merged: Merged, out: Path, base: str, modules: Mapping[str, torch.nn.Module] | None = None) -> list[str]:
    """Write the merged update as a PEFT LoRA folder, which loads anywhere and which `lab.export` writes in other layouts.

    base: what the configuration says it belongs to
    modules: of the network that it is laid on, by name, where text encoders' names need it (`lab.compress._engine.found`)
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    from lab.compress._engine import found, places

    placed = places(merged.factors.pairs)
    inside = {given: (found(place, modules or {}) or place).name for given, place in placed.items()}
    tensors, r = {}, merged.factors.rank
    for given, (B, A) in merged.factors.pairs.items():
        kernel = merged.factors.kernels.get(given)
        key = f"base_model.model.{inside[given]}"
        tensors[f"{key}.lora_A.weight"] = A.reshape(r, -1, *kernel).contiguous() if kernel else A.contiguous()
        tensors[f"{key}.lora_B.weight"] = B[:, :, None, None].contiguous() if kernel else B.contiguous()
    config = LoraConfig(
        r=r, lora_alpha=r, target_modules=sorted(inside.values()), base_model_name_or_path=base, inference_mode=True
    )
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return [str(out / "adapter_model.safetensors"), str(out / "adapter_config.json")]


def _common(adapters: Mapping[str, Updates]) -> list[str]:
    """All layers, in the order of the adapters. Raises LabError when two adapters have none in common."""
    lists = list(adapters.items())
    for name, updates in lists:
        if not updates:
            raise LabError(f"{name[:80]} changes no layer: leave it out.")
    first, rest = lists[0], lists[1:]
    for name, updates in rest:
        if not set(first[1]) & set(updates):
            raise LabError(
                f"{first[0][:80]} and {name[:80]} have no layer in common: they were made for different bases or parts."
            )
    return list(dict.fromkeys(layer for _, updates in lists for layer in updates))


def _parts(
    layer: str,
    adapters: Mapping[str, Updates],
    shares: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> tuple[tuple[int, ...], list[tuple[float, Matrix]]]:
    """The layer's shape, and (weight, ΔW (m, n)) of every adapter that has it."""
    if shapes is not None and layer not in shapes:
        raise LabError(
            f"The adapters change layer {layer[:120]}, which this base does not have: choose their own base."
        )
    shape, by, parts = (shapes or {}).get(layer), "the base", []
    for name, updates in adapters.items():
        if layer not in updates:
            continue
        own, X = _matrix(updates[layer])
        shape, by = (own, name) if shape is None else (shape, by)
        if (own[0], math.prod(own[1:])) != (shape[0], math.prod(shape[1:])):
            raise LabError(
                f"Layer {layer[:120]} is {'×'.join(map(str, own))} in {name[:80]} and {'×'.join(map(str, shape))} in "
                f"{by[:80]}: adapters of different bases cannot be merged."
            )
        shape = max(shape, own, key=len)  # the one that tells the kernel
        if not X.finite():
            raise LabError(f"{name[:80]} holds NaN or infinity in layer {layer[:120]}: the file is damaged.")
        parts.append((shares[name], X))
    assert shape is not None
    return shape, parts


def _matrix(delta: Delta) -> tuple[tuple[int, ...], Matrix]:
    """The update's shape, with its kernel where that is known, and the update as (m, n)."""
    from lab.compress._update import Matrix

    pair, told = delta.factors(), tuple(getattr(delta, "shape", ()))
    if pair is not None and told:  # a file's update tells its shape without being computed
        return told, Matrix(pair[0].double(), pair[1].double())
    whole = delta.dense().double()
    return tuple(whole.shape), Matrix(pair[0].double(), pair[1].double()) if pair else Matrix(whole.flatten(1))


def _sum(parts: Sequence[Matrix]) -> Matrix:
    """The sum, as factors side by side where all have them."""
    import torch

    from lab.compress._update import Matrix

    if all(x.right is not None for x in parts):
        return Matrix(
            torch.cat([x.left for x in parts], dim=1), torch.cat([x.right for x in parts if x.right is not None])
        )
    return Matrix(torch.stack([x.full() for x in parts]).sum(0))


def _rank(rank: int | None, parts: Sequence[tuple[float, Matrix]]) -> int:
    from lab.export import TRUNCATED_RANK

    return rank or max(TRUNCATED_RANK if x.right is None else x.right.shape[0] for _, x in parts)


def _factors(layer: str, goal: Matrix, how: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if how == "concat":
        if goal.right is None:
            raise LabError(
                f"The update of layer {layer[:120]} is of full rank, so there are no factors to put side by side: merge with svd."
            )
        return goal.left.float(), goal.right.float()
    U, S, Vh = goal.svd()
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).float(), (root[:, None] * Vh[:rank]).float()


def _by_peft(how: str, parts: Sequence[tuple[float, Matrix]], density: float, seed: int, layer: str) -> Matrix:
    """What PEFT's TIES or DARE makes of the whole updates, the random numbers of DARE from the seed and the layer."""
    import torch
    from peft.utils.merge_utils import dare_linear, ties

    from lab import counter
    from lab.compress._update import Matrix

    tensors, weights = [x.full() for _, x in parts], torch.tensor([w for w, _ in parts], dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counter.key("merge", seed, layer))
        if density == 1:  # nothing is dropped; PEFT says so in a warning for each tensor
            made = (
                (torch.stack(tensors) * weights[:, None, None]).sum(0)
                if how == "dare"
                else ties(tensors, weights, density)
            )
        else:
            made = (ties if how == "ties" else dare_linear)(tensors, weights, density)
    return Matrix(made)


def _padded(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], widest: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All of one rank, for readers that take one for the whole file."""
    from torch.nn.functional import pad

    return {
        layer: (pad(B, (0, widest - B.shape[1])).contiguous(), pad(A, (0, 0, 0, widest - A.shape[0])).contiguous())
        for layer, (B, A) in pairs.items()
    }


def merge_files(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None,
    how: str,
    out: Path,
    *,
    base: str | None = None,
    names: Sequence[str] | None = None,
    report: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`merge` and `save` of adapter files, folders or zips; `names` is how messages call them.

    Returns adapters (name, kind, parameters, bytes, weight), how, rank, parameters, bytes, relative_error, from_sum, layers,
    base (or None), adapter (the folder). Raises LabError also when files cannot be read, or are of different bases.
    """
    from lab import base_weights
    from lab.adapter_files import read
    from lab.compress._engine import reads_text
    from lab.compress._files import network

    shares = check(len(paths), weights, how, options.get("rank"), options.get("density", 0.5))
    files = [read(path, base, name=name) for path, name in zip(paths, names or [None] * len(paths), strict=True)]
    bases = {file.base.id: file.base for file in files if file.base}
    if len(bases) > 1:
        told = " and ".join(f"{file.name[:60]} was made for {file.base.name}" for file in files[:2] if file.base)
        raise LabError(f"Adapters of different bases cannot be merged: {told}.")
    row = next(iter(bases.values()), None)
    titles = [
        f"{file.name} ({i + 1})" if [f.name for f in files].count(file.name) > 1 else file.name
        for i, file in enumerate(files)
    ]
    adapters: dict[str, Updates] = {title: file.updates for title, file in zip(titles, files, strict=True)}
    shapes = base_weights.weights(row).layers() if row else None
    merged = merge(adapters, shares, how, shapes=shapes, report=report, **options)
    named = next((v for f in files if (v := f.metadata.get("base_model_name_or_path"))), "")
    modules = None
    if row and reads_text(merged.factors.pairs):
        modules = dict(network(row, merged.factors.pairs).named_modules())
    written = save(merged, out, row.public_name if row else named, modules)
    return {
        "adapters": [
            {"name": title, "kind": f.kind, "parameters": f.parameters, "bytes": f.bytes, "weight": w}
            for title, f, w in zip(titles, files, shares, strict=True)
        ],
        "how": how,
        "rank": merged.factors.rank,
        "parameters": sum(B.numel() + A.numel() for B, A in merged.factors.pairs.values()),
        "bytes": sum(Path(file).stat().st_size for file in written),
        "relative_error": merged.relative_error,
        "from_sum": merged.from_sum,
        "layers": merged.layers,
        "base": row.id if row else None,
        "adapter": str(out),
    }
