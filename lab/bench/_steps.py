"""Step times of adapted layers, as ratios within one run.

CPU time of one thread is measured, not the clock: other programs on the machine then do not count. Each repetition
runs every candidate in turn, and the least time of each is taken: what disturbs a run only ever adds to it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lab.methods import METHODS

M = N = 1280
TOKENS = 4096


def least_times(candidates: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Least seconds of each candidate, after one call to warm up."""
    best = dict.fromkeys(candidates, float("inf"))
    for repetition in range(repetitions + 1):
        for name, call in candidates.items():
            start = time.process_time()
            call()
            if repetition:
                best[name] = min(best[name], time.process_time() - start)
    return best


def layer(seed: int = 0) -> nn.Sequential:
    """A frozen 1280→1280 layer with a decaying spectrum."""
    g = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(N, M)).requires_grad_(False)
    made[0].weight.data = torch.randn(M, N, generator=g) / N**0.5
    return made


def step(model: nn.Module, tokens: int = TOKENS) -> Callable[[], None]:
    """Forward and backward of one layer, the gradient by its input included, as inside a network."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, N, generator=g).requires_grad_()
    out = torch.randn(tokens, M, generator=g)

    def call() -> None:
        model(x).backward(out)
        x.grad = None
        for p in model.parameters():
            p.grad = None

    return call


def adapted(method_id: str, **knobs: Any) -> nn.Module:
    method = METHODS[method_id]
    model = layer()
    x = torch.randn(32, N, generator=torch.Generator().manual_seed(2))
    return method.attach(model, method.knobs(**knobs), ["0"], calibrate=lambda: model(x).square().mean())


# -- the plain forms ------------------------------------------------------------------------------------------------
class PlainNora(nn.Module):
    """ΔW = B·B'·A'·A formed in full, then a second full product with the tokens: the authors' way."""

    def __init__(self, r_outer: int = 512, r_inner: int = 4) -> None:
        super().__init__()
        self.base = layer()
        U, S, Vh = torch.linalg.svd(self.base[0].weight, full_matrices=False)
        self.B, self.A = U[:, :r_outer].clone(), Vh[:r_outer].clone()
        root = S[:r_outer].sqrt().diag()
        self.b, self.a = nn.Parameter(root[:, :r_inner].clone()), nn.Parameter(root[:r_inner].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ (self.B @ self.b @ self.a @ self.A).T


class _Regenerated(torch.autograd.Function):
    """Σ cᵢ·vᵢ with the whole basis drawn from a seeded generator, forward and again backward: the authors' way."""

    @staticmethod
    def basis(k: int, size: int, seed: int) -> torch.Tensor:
        return torch.rand(k, size, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1).div_(k**0.5)

    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, size: int, seed: int) -> torch.Tensor:
        ctx.made_with = (c.numel(), size, seed)
        return c @ _Regenerated.basis(c.numel(), size, seed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Regenerated.basis(*ctx.made_with) @ grads[0], None, None


class PlainNola(nn.Module):
    def __init__(self, r: int = 8, k: int = 1000) -> None:
        super().__init__()
        self.base, self.r = layer(), r
        self.alpha, self.beta = nn.Parameter(torch.zeros(k)), nn.Parameter(torch.zeros(k))
        self.A0 = torch.randn(r, N) / N**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A = self.A0 + _Regenerated.apply(self.alpha, self.r * N, 1).view(self.r, N)
        B = _Regenerated.apply(self.beta, M * self.r, 2).view(M, self.r)
        return self.base(x) + (x @ A.T) @ B.T / self.r


# -- the tables -----------------------------------------------------------------------------------------------------
OURS: dict[str, tuple[str, dict[str, Any], int]] = {  # label → method, settings, rank of the LoRA it is held against
    "NoRA, r_outer 512, r_inner 4": ("nora", {"r_outer": 512, "r_inner": 4}, 8),
    "NOLA uniform, k = l = 1000": ("nola", {"r": 8, "k": 1000, "l": 1000, "basis": "uniform"}, 8),
    "NOLA uniform, no cache": ("nola", {"r": 8, "k": 1000, "l": 1000, "basis": "uniform", "cache_mib": 0}, 8),
    "NOLA shared, k = l = 1000": ("nola", {"r": 8, "k": 1000, "l": 1000, "basis": "shared"}, 8),
    "NOLA hadamard, k = l = 1000": ("nola", {"r": 8, "k": 1000, "l": 1000, "basis": "hadamard"}, 8),
    "PRANC hadamard, k = 1000": ("pranc", {"k": 1000, "basis": "hadamard"}, 8),
}


EMBEDDED: dict[
    str, tuple[str, dict[str, Any]]
] = {  # label → method, settings; NOLA's and PRANC's k and l are the defaults
    "LoRA, r 8": ("lora", {"r": 8}),
    "NoRA, r_outer 0.8, r_inner 4": ("nora", {"r_inner": 4}),
    "NOLA uniform": ("nola", {"r": 8, "basis": "uniform"}),
    "NOLA shared": ("nola", {"r": 8, "basis": "shared"}),
    "NOLA hadamard": ("nola", {"r": 8, "basis": "hadamard"}),
    "PRANC hadamard": ("pranc", {"basis": "hadamard"}),
}


def ours(repetitions: int) -> dict[str, Any]:
    """Our methods against LoRA of the same update rank, and against their plain forms."""
    calls = {label: step(adapted(id, **knobs)) for label, (id, knobs, _) in OURS.items()}
    calls["LoRA, r 8"] = step(adapted("lora", r=8))
    calls["base alone"] = step(layer())
    calls["plain NoRA"], calls["plain NOLA"] = step(PlainNora()), step(PlainNola())
    times = least_times(calls, repetitions)
    lora, base = times["LoRA, r 8"], times["base alone"]
    rows = [{"what": label, "seconds": times[label], "to_lora": times[label] / lora} for label in calls]
    nora, nola = times["NoRA, r_outer 512, r_inner 4"], times["NOLA hadamard, k = l = 1000"]
    return {
        "rows": rows,
        "plain_nora_over_nora": times["plain NoRA"] / nora,
        "plain_nola_over_nola": times["plain NOLA"] / nola,
        "plain_nola_over_nola_adapter_alone": (times["plain NOLA"] - base) / max(nola - base, 1e-9),
    }


def everyone(repetitions: int, tokens: int) -> list[dict[str, Any]]:
    """Every method of the registry at its default settings, against LoRA of its own rank, at most 32."""
    from lab.methods.spec import Layer

    rows, shape = [], Layer("0", M, N, None, "", True)
    reference: dict[int, Callable[[], None]] = {}
    for method in METHODS:
        rank = min(method.rank(shape, method.knobs()), 32) if method.low_rank else 8
        if rank not in reference:
            reference[rank] = step(adapted("lora", r=rank), tokens)
        model = adapted(method.id)
        model.train()
        method.before_step(model, 0, 100)
        times = least_times({"lora": reference[rank], "it": step(model, tokens)}, repetitions)
        rows.append({"method": method.id, "lora_rank": rank, "to_lora": times["it"] / times["lora"]})
    return rows


def embedded(repetitions: int) -> list[dict[str, Any]]:
    """The embedded base's whole training step (UNet forward and backward, batch 4, all attention projections)."""
    from lab import targets
    from lab.bases import BASES

    pipe = BASES["tiny-sdxl"].load("cpu", torch.float32)
    unet, config = pipe.unet, pipe.unet.config
    g = torch.Generator().manual_seed(0)
    side = config.sample_size
    x = torch.randn(4, config.in_channels, side, side, generator=g)
    text = torch.randn(4, 77, config.cross_attention_dim, generator=g)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    extra = {"text_embeds": torch.randn(4, pooled, generator=g), "time_ids": torch.full((4, 6), float(side * 8))}
    steps = torch.tensor([10, 300, 600, 900])
    names = targets.modules(unet, "attn")
    calls: dict[str, Callable[[], Any]] = {}
    for label, (id, knobs) in EMBEDDED.items():
        method = METHODS[id]
        model = method.attach(copy.deepcopy(unet), method.knobs(**knobs), names)

        def call(model: Any = model) -> None:
            model(x, steps, text, added_cond_kwargs=extra).sample.square().mean().backward()

        calls[label] = call
    times = least_times(calls, repetitions)
    return [
        {"method": label, "ms": times[label] * 1e3, "to_lora": times[label] / times["LoRA, r 8"]} for label in times
    ]
