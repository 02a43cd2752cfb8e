"""The memory estimate of lab/memory.py against measured peaks, and the constants that it is made with.

Measured: real training steps of the embedded base's UNet and of one transformer block of SDXL's real size, float32,
every tensor's storage counted as it is made and freed (what torch.cuda.max_memory_allocated counts on a GPU).

    python -m lab bench budget_memory                      every method on both
    python -m lab bench budget_memory --method lora,nora
    python -m lab bench budget_memory --write              and write lab/bench/budget_memory_peaks.csv
    python -m lab bench budget_memory --fit                write lab/bench/budget_memory.csv again
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
from collections.abc import Callable
from typing import Any

from lab import architectures, memory
from lab.architectures import Architecture, Row
from lab.methods import METHODS

HELP = "the memory estimate against measured peaks"
BATCH, STEPS = 4, 3
PEAKS = memory.PROFILES.with_name("budget_memory_peaks.csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="", metavar="IDS", help="methods between commas (default all)")
    parser.add_argument("--base", choices=("tiny-sdxl", "block", "both"), default="both")
    parser.add_argument("--write", action="store_true", help=f"write what was measured into {PEAKS.name}")
    parser.add_argument("--fit", action="store_true", help="measure what each method keeps in one layer, and save it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"rows": [{"base", "method", "measured", "estimated", "ratio"}]}, or {"fitted": n}."""
    ids = [id for id in args.method.split(",") if id] or METHODS.ids()
    if args.fit:
        return {"fitted": fit(ids)}
    bases = {"tiny-sdxl": tiny_sdxl, "block": sdxl_block}
    rows = []
    for name, base in bases.items():
        if args.base in (name, "both"):
            for id in ids:
                rows.append(compare(name, *base(), id))
                if args.write:
                    write(rows)
    return {"rows": rows}


def write(rows: list[dict[str, Any]]) -> None:
    """Put the rows into the table of peaks, in place of older ones of the same base and method."""
    columns = ["base", "method", "measured", "estimated", "ratio", "error"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if PEAKS.is_file():
        with PEAKS.open(encoding="utf-8", newline="") as file:
            found = {(row["base"], row["method"]): row for row in csv.DictReader(file)}
    found |= {(row["base"], row["method"]): row for row in rows}
    with PEAKS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(found.values())


# -- bases: (architecture, rows to adapt, make the model, make its inputs) ------------------------------------
Base = tuple[Architecture, list[Row], Callable[[], Any], Callable[[Any], dict[str, Any]]]


def tiny_sdxl() -> Base:
    """The embedded base's UNet as it is trained: batch 4, adapters on attention."""
    from diffusers import UNet2DConditionModel

    arch = architectures.load("tiny-sdxl")
    config = json.loads((architectures.FOLDER.parent / "tiny-sdxl/unet/config.json").read_text())

    def inputs(model: Any) -> dict[str, Any]:
        import torch

        c, side = model.config, model.config.sample_size
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        extra = {"text_embeds": torch.randn(BATCH, pooled), "time_ids": torch.randn(BATCH, 6)}
        words = torch.randn(BATCH, arch.unit["tokens"], c.cross_attention_dim)
        steps = torch.zeros(BATCH, dtype=torch.long)
        latents = torch.randn(BATCH, c.in_channels, side, side)
        return {"sample": latents, "timestep": steps, "encoder_hidden_states": words, "added_cond_kwargs": extra}

    return arch, arch.select("attn"), lambda: UNet2DConditionModel.from_config(config), inputs


def sdxl_block(width: int = 1280, heads: int = 20, words: int = 2048, positions: int = 256) -> Base:
    """One transformer block of SDXL's widest stage; its table is made here as the shipped ones are."""
    from lab import activations, layer_tables

    def make() -> Any:
        from diffusers.models.attention import BasicTransformerBlock

        return BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=words)

    def sample(count: int) -> dict[str, Any]:
        import torch

        hidden = torch.randn(count, positions, width, requires_grad=True)
        return {"hidden_states": hidden, "encoder_hidden_states": torch.randn(count, 77, words)}

    import torch

    with torch.device("meta"):
        model = make()
    found = layer_tables.rows(model)
    names = [row["name"] for row in found]
    linear = {row["name"] for row in found if row["role"] in ("q", "k", "v", "out")}

    def meta() -> Any:
        with torch.device("meta"):
            return make()

    traced = activations.trace(meta, lambda _m: sample(1), names, start=linear)
    for row in found:
        tokens, number, kept = traced.inputs[row["name"]]
        row |= {"tokens": tokens, "grows": 0, "input": number, "kept": int(kept)}
    table = {
        "id": "sdxl-block",
        "name": "One transformer block of SDXL",
        "parameters": layer_tables.parameters(model),
        "library": "diffusers",
        "source": "",
        "note": "",
        "unit": {"kind": "text"},
        "memory": {"linear": {"kept": [traced.kept] * 2, "peak": [traced.peak] * 2}},
        "fields": layer_tables.FIELDS,
        "layers": layer_tables.pack(found),
    }
    arch = architectures.parse(table)
    return arch, arch.select("attn"), make, lambda _m: sample(BATCH)


# -- measuring ---------------------------------------------------------------------------------------------
def peak(base: Base, id: str, settings: dict[str, Any] | None = None) -> int:
    """Bytes alive at the peak of a training step, from the second step on."""
    import torch

    from lab.activations import Allocations, mean_square

    _, rows, make, inputs = base
    method = METHODS[id]
    torch.manual_seed(0)
    gc.collect()
    counter = Allocations()
    with counter:
        plain = make().requires_grad_(False)
        given = inputs(plain)
        one = {k: _first(v) for k, v in given.items()}

        def batch() -> torch.Tensor:
            return mean_square(plain(**one))

        knobs = method.knobs.parse(settings or {})
        model = method.attach(plain, knobs, [row.layer.name for row in rows], seed=0, calibrate=batch)
        plain.zero_grad(set_to_none=True)
        optimizer = method.optimizer(model, 1e-3)
        for step in range(STEPS):
            if step == 1:
                gc.collect()
                counter.peak = counter.now
            if hasattr(method, "before_step"):
                method.before_step(model, step, STEPS)
            loss = mean_square(model(**given))
            penalty = method.penalty(model)
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            method.after_step(model, step, STEPS)
            optimizer.zero_grad(set_to_none=True)
            del loss, penalty
        return counter.peak


def _first(value: Any) -> Any:
    return {k: _first(v) for k, v in value.items()} if isinstance(value, dict) else value[:1]


def compare(name: str, arch: Architecture, rows: list[Row], make: Any, inputs: Any, id: str) -> dict[str, Any]:
    """Measured and estimated bytes of one method on one base; an error's sentence where it does not fit."""
    method = METHODS[id]
    try:
        measured = peak((arch, rows, make, inputs), id)
        estimated = memory.estimate(arch, rows, method, method.knobs(), batch=BATCH).total
    except Exception as problem:
        return {"base": name, "method": id, "error": " ".join(str(problem).split())[:160]}
    found = {"base": name, "method": id, "measured": measured, "estimated": estimated}
    return found | {"ratio": round(estimated / measured, 3)}


# -- what a method keeps in one layer ----------------------------------------------------------------------
SHAPES = [(96, 160, 24), (96, 160, 72), (192, 160, 24), (96, 320, 24), (192, 320, 72), (256, 256, 48), (160, 160, 96)]


def kept(id: str, m: int, n: int, tokens: int) -> float:
    """Numbers that one m×n layer's adapter keeps for the backward pass, without its input and its own tensors."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from lab.activations import mean_square

    method = METHODS[id]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = torch.nn.Linear(n, m)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.to_q(x)

    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    x = torch.randn(tokens, n, requires_grad=True)  # as inside a model: gradients pass through the layer
    model = method.attach(net, method.knobs(), ["to_q"], seed=0, calibrate=lambda: mean_square(net(x)))
    if hasattr(method, "before_step"):
        method.before_step(model, 0, 4)
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), x]}

    def forward() -> tuple[Any, dict[int, tuple[StorageWeakRef, int]]]:
        found: dict[int, tuple[StorageWeakRef, int]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.layout == torch.strided and tensor.untyped_storage()._cdata not in own:
                storage = tensor.untyped_storage()
                found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return model(x + 0.0), found

    first, found = forward()
    gc.collect()
    constants = {k for k, (ref, _) in found.items() if not ref.expired()}
    second, found = forward()  # what it keeps again is no layer's: a transform's matrix, shared by all
    gc.collect()
    alive = sum(size for k, (ref, size) in found.items() if k not in constants and not ref.expired())
    del first, second
    return alive / 4 - tokens * n  # the copy of x that `x + 0.0` made is the layer's input


def fit(ids: list[str]) -> int:
    """Write the constants of `memory.profiles`: kept = a·T + b·T·m + c·T·n + d·m·n + e·n² + f·m², T positions."""
    import numpy as np

    made = []
    for id in ids:
        try:
            y = np.array([kept(id, *shape) for shape in SHAPES])
        except Exception as problem:
            print(f"{id}: {' '.join(str(problem).split())[:120]}")
            continue
        basis = np.array([[t, t * m, t * n, m * n, n * n, m * m] for m, n, t in SHAPES], dtype=float)
        found = _nonnegative(basis, np.maximum(y, 0))
        made.append({"method": id, **{k: round(float(v), 3) for k, v in zip(memory.TERMS, found, strict=True)}})
    rows: dict[str, dict[str, Any]] = {id: {"method": id, **terms} for id, terms in memory.profiles().items()}
    rows.update((str(row["method"]), row) for row in made)
    with memory.PROFILES.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", *memory.TERMS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    return len(made)


def _nonnegative(basis: Any, y: Any) -> Any:
    """Least squares with coefficients of at least 0: the best of all choices of terms, fewer where they do as well."""
    import itertools

    import numpy as np

    columns = range(basis.shape[1])
    best, least = np.zeros(len(columns)), float(y @ y)
    for chosen in itertools.chain.from_iterable(itertools.combinations(columns, k) for k in (1, 2, 3, 4)):
        found, *_ = np.linalg.lstsq(basis[:, chosen], y, rcond=None)
        if (found < 0).any():
            continue
        error = float(((basis[:, chosen] @ found - y) ** 2).sum())
        if error < 0.9 * least - 1e-6 * float(y @ y):
            best, least = np.zeros(len(columns)), error
            best[list(chosen)] = found
    return best


def show(result: dict[str, Any]) -> None:
    if "fitted" in result:
        print(f"{result['fitted']} methods in {memory.PROFILES.name}")
        return
    for row in result["rows"]:
        if "error" in row:
            print(f"{row['base']:10s} {row['method']:16s} {row['error']}")
        else:
            print(
                f"{row['base']:10s} {row['method']:16s} measured {row['measured'] / 1e6:8.1f} MB, estimated {row['ratio']:.3f} of it"
            )
