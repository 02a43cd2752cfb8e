"""What starting and holding adapters costs on the 560 attention projections of an SDXL-sized UNet."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab import svd
from lab.methods import METHODS

# (out, in) → how many of the UNet's to_q, to_k, to_v, to_out.0 have this shape
SHAPES = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}
assert sum(SHAPES.values()) == 560


def decaying(m: int, n: int, seed: int) -> torch.Tensor:
    """A weight with random singular vectors and a spectrum that falls as trained projections' do: σᵢ ∝ (1 + i/30)^-0.8."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(s, r, generator=g))[0] for s in (m, n))
    return (U * (1 + torch.arange(r) / 30.0).pow(-0.8)) @ V.T


def starts(layers_a_shape: int, r_outer: float = 0.8) -> dict[str, Any]:
    """Seconds of a NoRA start, of `torch.linalg.svd` layer by layer, and from the cache, over all 560 layers.

    Measured on a few layers of each shape and scaled by their number, in CPU seconds of one thread, so that other
    programs do not count. (With more threads the lab does as many layers at once, which is not in these numbers.)
    """
    warm = decaying(300, 300, 0)
    with tempfile.TemporaryDirectory() as folder, svd.cached_in(Path(folder)):
        svd.basis(warm, 16)
        svd.basis(warm, 16)
    total = {"svd": 0.0, "svd64": 0.0, "lab": 0.0, "cache": 0.0}
    worst = {"svd": 0.0, "lab": 0.0}
    for (m, n), count in SHAPES.items():
        weights = [decaying(m, n, seed) for seed in range(layers_a_shape)]
        r, scale = int(r_outer if r_outer >= 1 else r_outer * min(m, n)), count / layers_a_shape
        began = time.process_time()
        plain = [torch.linalg.svd(W, full_matrices=False) for W in weights]
        total["svd"] += (time.process_time() - began) * scale
        with tempfile.TemporaryDirectory() as folder, svd.cached_in(Path(folder)):
            began = time.process_time()
            found = svd.bases(weights, [r] * len(weights))
            total["lab"] += (time.process_time() - began) * scale
            began = time.process_time()
            svd.bases(weights, [r] * len(weights))
            total["cache"] += (time.process_time() - began) * scale
        began = time.process_time()
        exact = svd.exact(weights[0])
        total["svd64"] += (time.process_time() - began) * count
        worst["svd"] = max(worst["svd"], off(plain[0][0][:, :r], exact.U[:, :r]))
        worst["lab"] = max(worst["lab"], off(found[0].U, exact.U[:, :r]))
    return {
        "seconds": total,
        "speedup": total["svd"] / total["lab"],
        "speedup64": total["svd64"] / total["lab"],
        "subspace_error": worst,
    }


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Sine of the largest angle between two subspaces: ‖(I − QQᵀ)·U‖."""
    Q, U = exact.double(), found.double()
    return float(torch.linalg.matrix_norm(U - Q @ (Q.T @ U), ord=2))


class Unet(nn.Module):
    """560 layers of SDXL's shapes, those of one shape sharing one weight, so that only adapters take memory."""

    def __init__(self) -> None:
        super().__init__()
        weights = {shape: nn.Parameter(torch.zeros(shape), requires_grad=False) for shape in SHAPES}
        self.layers = nn.ModuleList()
        for (m, n), count in SHAPES.items():
            for _ in range(count):
                made = nn.Linear(n, m, bias=False, device="meta")
                made.weight = weights[m, n]
                self.layers.append(made)

    def forward(self, inputs: dict[int, torch.Tensor]) -> torch.Tensor:
        layers: list[Any] = list(self.layers)
        return torch.stack([layer(inputs[layer.weight.shape[1]]).sum() for layer in layers]).sum()


def held_bytes(method_id: str, **knobs: Any) -> int:
    """Bytes an adapter holds in a training step on that UNet: trained and frozen tensors, gradients, AdamW's averages,
    all it keeps for the backward pass beside the base's weights, and what is cached of its basis."""
    from lab.methods import _basis

    method, cached = METHODS[method_id], _basis.cache.bytes
    model = method.attach(Unet(), method.knobs(**knobs), [f"layers.{i}" for i in range(560)])
    inputs = {n: torch.zeros(1, n) for n in (640, 1280, 2048)}
    modules: list[Any] = list(model.modules())
    base = {m.get_base_layer().weight.untyped_storage().data_ptr() for m in modules if hasattr(m, "base_layer")}
    base |= {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in base:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    trained = [p for p in model.parameters() if p.requires_grad]
    for tensor in [*trained, *model.buffers()]:
        keep(tensor)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(inputs)
    loss.backward()
    averages = 3 * sum(p.numel() * p.element_size() for p in trained)  # and gradients
    return sum(kept.values()) + averages + _basis.cache.bytes - cached


def _eight_layers(method: Any) -> Any:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).requires_grad_(False)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    names = [str(i) for i in range(8)]
    return method.attach(model, method.knobs(), names, calibrate=lambda: model(x).square().mean())


def file_overheads() -> list[dict[str, Any]]:
    """Bytes of saved adapters beyond parameters × bytes a parameter and their names, on a model of 8 layers. "stored": bytes
    of frozen tensors that came from data, so that nothing else could make them again; they are no part of "beyond"."""
    from safetensors import safe_open

    rows = []
    for method in (m for m in METHODS if m.own):
        made = _eight_layers(method)
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder, save_embedding_layers=False)
            path = Path(folder) / "adapter_model.safetensors"
            with safe_open(str(path), "pt") as file:
                sizes = {k: 4 * math.prod(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            trained = {n.replace(".default", "") for n, p in made.named_parameters() if p.requires_grad}
            parameters = sum(p.numel() * 4 for p in made.parameters() if p.requires_grad)
            extra = ("checksum", "fingerprint")
            held = made.peft_config["default"].stored
            stored = sum(size for k, size in sizes.items() if held and k not in trained and not k.endswith(extra))
            beyond = path.stat().st_size - parameters - sum(map(len, sizes)) - stored
            rows.append({"method": method.id, "parameters": parameters // 4, "beyond": beyond, "stored": stored})
    return rows
