"""What training an adapter takes in memory, estimated from the layer tables. Imports no torch.

Counted: the model's weights; the adapter's trained numbers, their gradients and Adam's two moments, in float32; the
adapter's frozen tensors (outer factors, projections, bases kept between steps); what the frozen model keeps for the backward pass of a batch,
found by passing fake tensors through it (lab/activations.py); what the adapters keep beside that; and the largest
temporary tensors of the backward pass. Not counted: the framework itself, the memory that its allocator holds back,
a pipeline's other parts (VAE, text encoders that are not trained), data, and what a kernel library keeps for itself.
No gradient checkpointing; attention is one that keeps no square of tokens, as torch's is.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import budget
from lab.architectures import Architecture, Row
from lab.errors import LabError
from lab.methods.own import OwnMethod
from lab.methods.spec import Layer, Method

BYTES = {"fp32": 4.0, "bf16": 2.0, "8 bit": 1.0, "4 bit": 0.5}  # of the frozen model's weights
TRAINED = 4  # bytes of a trained number, and of its gradient and each of Adam's moments
MAX_BATCH = 4096
# What a method keeps in one m×n layer that T positions pass: T, T·m, T·n, m·n, n², m² times these (measured by
# `python -m lab bench budget_memory --fit`).
PROFILES = Path(__file__).resolve().parent / "bench" / "budget_memory.csv"
TERMS = ("T", "Tm", "Tn", "mn", "nn", "mm")


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step at its peak, by what they are for."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    frozen: int
    kept: int  # by the frozen model, for the backward pass
    adapter: int  # kept by the adapters, for the backward pass
    temporary: int

    @property
    def total(self) -> int:
        """The peak: before the backward pass frees what was kept, or at the optimizer's step, whichever is higher."""
        always = self.weights + self.trained + self.optimizer + self.frozen
        return always + max(self.kept + self.adapter + self.temporary, 3 * self.gradients)


def known(arch: Architecture) -> bool:
    """Whether the architecture's table says what a training sample keeps (uploaded and pasted tables do not)."""
    return bool(arch.memory)


def estimate(
    arch: Architecture,
    rows: Sequence[Row],
    method: Method,
    knobs: Any,
    *,
    batch: int = 1,
    size: float = 1.0,
    precision: str = "fp32",
    trained: int | None = None,
) -> Estimate:
    """Memory of training `method` on these rows of `arch`.

    `size` is the share of the table's sample: of its side for images of diffusion models, of its tokens for texts.
    Raises LabError on an unknown precision and on a batch or size out of range.
    """
    if precision not in BYTES:
        raise LabError(f"The precision is one of {', '.join(BYTES)}, got '{precision}'.")
    if not 1 <= batch <= MAX_BATCH:
        raise LabError(f"The batch is between 1 and {MAX_BATCH:,} samples, got {batch:,}.")
    if not 0 < size <= 16:
        raise LabError(f"The sample's size is between 0 and 16 times the model's own, got {size:g}.")
    compute = 4 if precision == "fp32" else 2
    total = budget.count(method, [row.layer for row in rows], knobs) if trained is None else trained
    kept, temporary = _model(arch, rows, size)
    a_sample, always = _adapters(rows, method, knobs, compute, _grown(arch, size))
    return Estimate(
        weights=math.ceil(arch.parameters * BYTES[precision]),
        trained=TRAINED * total,
        gradients=TRAINED * total,
        optimizer=2 * TRAINED * total,
        frozen=frozen(method, [row.layer for row in rows], knobs),
        kept=round(batch * kept * compute / 4),
        adapter=round(batch * a_sample + always),
        temporary=round(batch * temporary * compute / 4),
    )


def _grown(arch: Architecture, size: float) -> float:
    """How many times the table's positions a layer sees: pixels grow with the square of the side."""
    return size * size if arch.unit.get("kind") == "image" and arch.unit.get("latent") else size


def _model(arch: Architecture, rows: Sequence[Row], size: float) -> tuple[float, float]:
    """(bytes that the frozen model keeps for one sample, bytes of temporaries) in float32: a line through the full
    and the half size of the table."""
    if not arch.memory:
        return 0.0, 0.0
    conv = "conv" in arch.memory and any(row.layer.role == "conv" for row in rows)
    found = arch.memory["conv" if conv or "linear" not in arch.memory else "linear"]
    full, half = 1.0, _grown(arch, 0.5)
    share = (_grown(arch, size) - half) / (full - half)
    kept, peak = (found[k][1] + (found[k][0] - found[k][1]) * share for k in ("kept", "peak"))
    return max(0.0, kept), max(0.0, peak - kept)


@functools.cache
def profiles() -> dict[str, dict[str, float]]:
    """The measured constants by method."""
    if not PROFILES.is_file():
        return {}
    with PROFILES.open(encoding="utf-8", newline="") as file:
        return {row["method"]: {term: float(row[term]) for term in TERMS} for row in csv.DictReader(file)}


def profile(method: Method, knobs: Any) -> dict[str, float]:
    """The method's constants at these settings. What it keeps a position is the rank where the update is of low
    rank, and grows with the knob `r` elsewhere; a method that was never measured is taken to keep its product, or an
    update of the weight's size."""
    measured = profiles().get(method.id)
    if method.low_rank:
        return {**dict.fromkeys(TERMS, 0.0), "T": -1.0}
    if measured is None:
        return {**dict.fromkeys(TERMS, 0.0), "mn": 1.0}
    rank, default = getattr(knobs, "r", None), getattr(method.knobs(), "r", None)
    if isinstance(rank, int) and isinstance(default, int) and default > 0:
        return {**measured, "T": measured["T"] * rank / default}
    return measured


def _adapters(rows: Sequence[Row], method: Method, knobs: Any, compute: int, grown: float) -> tuple[float, float]:
    """Bytes that the adapters keep: (a sample, whatever the batch).

    Their inputs, where the model does not keep them anyway (layers that read one tensor share it; beside a model in
    half precision each has its own float32 copy), and what `profile` says.
    """
    a_sample = always = 0.0
    p = profile(method, knobs)
    for row, own, times in _kinds(rows):
        x = row.layer
        tokens = times * row.tokens * (grown if row.grows else 1.0)
        if compute != TRAINED:
            a_sample += tokens * x.n
        elif own:
            a_sample += tokens * x.in_
        thin = _rank(method, x, knobs) if p["T"] < 0 else p["T"]
        a_sample += tokens * (thin + p["Tm"] * x.m + p["Tn"] * x.n)
        if p["T"] < 0 and method.own:  # the lab's own fold their factors into thin ones in every step
            always += times * thin * (x.m + x.n)
        always += times * (p["mn"] * x.m * x.n + p["nn"] * x.n * x.n + p["mm"] * x.m * x.m)
    return TRAINED * a_sample, TRAINED * always


_counted: dict[int, tuple[Sequence[Row], int, list[tuple[Row, bool, int]]]] = {}


def _kinds(rows: Sequence[Row]) -> list[tuple[Row, bool, int]]:
    """(one row of a kind, whether its adapter keeps its input by itself, how many there are of it); remembered for
    the lists seen last."""
    found = _counted.get(id(rows))
    if found is not None and found[0] is rows and found[1] == len(rows):
        return found[2]
    seen: set[int] = set()
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        x = row.layer
        own = not row.kept and (row.input < 0 or row.input not in seen)
        if own:
            seen.add(row.input)
        key = (x.out, x.in_, x.kernel, x.role, x.bias, row.tokens, row.grows, own)
        kinds.setdefault(key, [row, own, 0])[2] += 1
    if len(_counted) > 32:
        _counted.clear()
    made = [(row, own, times) for row, own, times in kinds.values()]
    _counted[id(rows)] = (rows, len(rows), made)
    return made


def _rank(method: Method, layer: Layer, knobs: Any) -> int:
    try:
        return method.rank(layer, knobs)
    except (NotImplementedError, AttributeError, TypeError):
        return 0


def frozen(method: Method, layers: Sequence[Layer], knobs: Any) -> int:
    """Bytes of the adapter's frozen tensors: outer factors, projections, and bases kept between steps; none for most
    methods."""
    if not isinstance(method, OwnMethod):
        return 0
    groups = budget.shapes(layers)
    try:
        entries = sum(
            times * sum(math.prod(s) for s in method.shapes(layer, knobs).values()) for layer, times in groups
        )
    except NotImplementedError:
        entries = 0
    room = getattr(knobs, "cache_mib", 0) << 20
    return TRAINED * entries + min(room, sum(times * method.cached(layer, knobs) for layer, times in groups))


@functools.cache
def explain() -> str:
    """What the estimate counts, in one paragraph."""
    return " ".join((__doc__ or "").split("\n\n", 1)[1].split())
