"""MoS, Mixture of Shards: LoRA matrices put together from shards of pools that layers share (Wang et al. 2024, arXiv 2410.00938).

ΔW_l = s·B_l·A_l. Each row of A_l (and column of B_l) is the concatenation of `shards` pieces of length n/shards
(m/shards), picked from a pool by index lists that are drawn once and stay; A and B have pools and lists of their own (pair
dissociation). `private` of the r rows come from shards that are the layer's alone, the others from the pool that all
layers of one role and shape share. A layer contributes `share` rows' worth of shards in all, private ones included, so
that layers of a group train share·(m + n) numbers each, at a rank r above that.
Official code: github.com/Forence1999/MoS (commit cafb8dd), modules/Tied_LoRA.py (`transform_chunks`: row j takes indices j·shards, …,
j·shards + shards − 1; shared rows first; `torch.randperm` without replacement; A ~ LoRA's start for full rows, B = 0;
one pool per projection of the network). Its `lora_A_vec` is frozen at one and left out. A group too small to fill
r rows without repeating a shard gives as many as it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods._common import check_divides
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class MosKnobs(Knobs):
    r: int = knob(8, "Rank of the update.", low=1)
    share: int = knob(2, "Rank's worth of shards that each layer adds: what it costs.", low=1, size=True)
    private: int = knob(1, "Of these, the rank's worth that stays the layer's own.", low=0)
    shards: int = knob(2, "Pieces of a row or column; must divide both sides of every layer.", low=1)
    scale: float = knob(1.0, "Factor of the update (LoRA's alpha / r).", low=1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private > self.share:
            raise LabError(f"private must be at most share = {self.share}, got {self.private}.")
        if self.r < self.share:
            raise LabError(f"r must be at least share = {self.share}, got {self.r}: raise r or lower share.")


class Mos(OwnMethod):
    """Mixture of Shards: MosConfig(r, share, private, shards, scale)."""

    id, name = "mos", "MoS"
    paper = Paper("MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", "2410.00938")
    kind = "weight update"
    summary = "LoRA matrices assembled from shards, some the layer's own and most from a pool that layers share."
    equation = r"\Delta W_l = s\,B_l A_l,\qquad \text{rows of } A_l,\ \text{columns of } B_l:\ \text{shards picked from shared and private pools}"
    knobs = MosKnobs
    learning_rate = 2e-3
    low_rank = True
    tensors = {
        "trained": {
            "pool_a": "shards × n/l, shared",
            "pool_b": "shards × m/l, shared",
            "own_a": "p·l × n/l",
            "own_b": "p·l × m/l",
        },
        "frozen": {"pick_a": "(r−p)·l", "pick_b": "(r−p)·l"},
    }
    remark = "The rank is r where a group has enough layers to fill it; a single layer has rank share."

    def group(self, layer: Layer) -> str:
        return f"{layer.role or 'all'}_{layer.m}x{layer.n}"

    def check(self, layer: Layer, knobs: MosKnobs) -> None:
        check_divides(layer, knobs.shards, "shards")

    def count_layer(self, layer: Layer, knobs: MosKnobs) -> int:
        return knobs.share * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: MosKnobs) -> int:
        return min(knobs.r, layer.m, layer.n)

    def groups(self, layers: Sequence[Layer]) -> dict[str, list[Layer]]:
        found: dict[str, list[Layer]] = {}
        for layer in layers:
            found.setdefault(self.group(layer), []).append(layer)
        return found

    def init_shared(self, layers: list[Layer], knobs: MosKnobs, start: Start) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        if knobs.share == knobs.private:
            return made
        for name, group in self.groups(layers).items():
            rows = (knobs.share - knobs.private) * len(group) * knobs.shards
            made[f"pool_a_{name}"] = self.shard(start, rows, group[0].n, knobs)
            made[f"pool_b_{name}"] = start.zeros(rows, group[0].m // knobs.shards)
        return made

    def shard(self, start: Start, rows: int, n: int, knobs: MosKnobs) -> torch.Tensor:
        """Shards of A: uniform in ±1/√n, the start of whole rows."""
        return start.kaiming(rows, n // knobs.shards) * knobs.shards**-0.5

    def shared_for(self, layer: Layer, knobs: MosKnobs) -> dict[str, str]:
        if knobs.share == knobs.private:
            return {}
        return {name: f"{name}_{self.group(layer)}" for name in ("pool_a", "pool_b")}

    def init(self, start: Start, knobs: MosKnobs) -> Tensors:
        import torch

        m, n, own = start.layer.m, start.layer.n, knobs.private * knobs.shards
        trained, frozen = {}, {}
        if own:
            trained = {"own_a": self.shard(start, own, n, knobs), "own_b": start.zeros(own, m // knobs.shards)}
        if start.shared:
            pool = start.shared["pool_a"].shape[0]
            picked = min((knobs.r - knobs.private) * knobs.shards, pool)
            for name in ("pick_a", "pick_b"):
                frozen[name] = torch.randperm(pool, generator=start.generator)[:picked].to(start.device)
        return Tensors(trained, frozen)

    def factors(self, t: Mapping[str, torch.Tensor], knobs: MosKnobs, layer: Layer) -> Any:
        A = self.assemble(t, "a", layer.n)
        return self.assemble(t, "b", layer.m).T * knobs.scale, A

    def assemble(self, t: Mapping[str, torch.Tensor], side: str, length: int) -> torch.Tensor:
        """Rows (rank, length) from shared shards, then private ones; consecutive shards make a row."""
        import torch

        parts = [t[f"pool_{side}"][t[f"pick_{side}"]]] if f"pick_{side}" in t else []
        parts += [t[f"own_{side}"]] if f"own_{side}" in t else []
        return torch.cat(parts).reshape(-1, length)


register(Mos())
