"""HashedNet: every entry of the update is one of K trained numbers, chosen by a hash (Chen et al. 2015, arXiv 1504.04788).

ΔW_ij = s·ξ(i, j)·w_{h(i, j)}: h hashes an entry to one of K buckets, ξ to a sign ±1; w (K) is trained, zero at the
start. The paper compresses a network's weights themselves with xxHash; here the same form is an update, and the hash
is the lab's own (`lab/counter.py`), the same on every device. PRANC's release has the same form without signs and with
buckets of equal size (github.com/UCDvision/PRANC, commit 04c2776, utils.py, `init_bin_alpha`). The hash is computed again in each pass: an index per entry
would take as much memory as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class HashednetKnobs(Knobs):
    k: int = knob(64, "How many numbers are trained in each layer.", low=1, size=True)
    scale: float = knob(1.0, "Factor of the update.", low=1e-6)


class Hashednet(OwnMethod):
    """HashedNet: HashednetConfig(k, scale)."""

    id, name = "hashednet", "HashedNet"
    paper = Paper("Compressing Neural Networks with the Hashing Trick", "1504.04788")
    kind = "weight update"
    summary = "Every entry of the update is one of k trained numbers, picked and signed by a hash of its place."
    equation = (
        r"\Delta W_{ij} = s\,\xi(i,j)\,w_{h(i,j)},\qquad h: (i,j) \mapsto \{1, \dots, K\},\ \xi: (i,j) \mapsto \pm 1"
    )
    knobs = HashednetKnobs
    learning_rate = 1e-4
    tensors = {"trained": {"w": "k"}, "frozen": {"h, ξ": "hashes, from the seed"}}
    remark = "The paper hashes a network's weights; here the same form is an update of frozen weights."

    def count_layer(self, layer: Layer, knobs: HashednetKnobs) -> int:
        return knobs.k

    def init(self, start: Start, knobs: HashednetKnobs) -> Tensors:
        return Tensors({"w": start.zeros(knobs.k)})

    def delta(self, t: Mapping[str, torch.Tensor], knobs: HashednetKnobs, layer: Layer) -> torch.Tensor:
        from lab import counter
        from lab.methods._hashing import Spread

        key = counter.key("hashednet", knobs.seed, layer.name)
        return Spread.apply(t["w"], key, layer.m * layer.n).reshape(layer.m, layer.n) * knobs.scale


register(Hashednet())
