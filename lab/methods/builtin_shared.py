"""Methods whose large tensors are shared by layers, random and frozen, or one trained bank. From PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.methods import register
from lab.methods.builtin import PeftMethod
from lab.methods.spec import Knobs, Layer, Paper, knob


@dataclass
class VeraKnobs(Knobs):
    r: int = knob(256, "Rank of the shared random pair.", low=1, size=True)
    d_initial: float = knob(0.1, "Start of the inner vector.", low=0)


class Vera(PeftMethod):
    id, name, order = "vera", "VeRA", 40
    learning_rate = 0.01
    paper = Paper("VeRA: Vector-based Random Matrix Adaptation", "2310.11454")
    kind = "weight update"
    summary = "One frozen random pair for all layers; each layer trains two scaling vectors."
    equation = r"\Delta W = \mathrm{diag}(b)\,B\,\mathrm{diag}(d)\,A"
    knobs = VeraKnobs
    alone = True
    tensors = {"trained": {"b": "m", "d": "r"}, "frozen": {"A": "r × max n", "B": "max m × r", "W": "m × n"}}
    product = ("b", "B", "d", "A")
    remark = "The random pair is drawn again from the seed when a file is loaded. Adapters of one model share the seed."
    peft_config = "VeraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "d_initial": knobs.d_initial, "projection_prng_key": seed, "save_projection": False}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.m + knobs.r

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


class Pvera(Vera):
    id, name, order = "pvera", "PVeRA", 41
    paper = Paper("PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", "2512.07703")
    summary = "VeRA with a distribution over the inner activations, sampled in training, its mean used after."
    equation = r"\Delta W x = \mathrm{diag}(b)\,B\,z,\quad z \sim \mathcal N(\mu(Ax), \sigma(Ax))"
    tensors = {"trained": {"b": "m", "d": "2r"}, "frozen": {"A": "2r × max n", "B": "max m × r", "W": "m × n"}}
    peft_config = "PveraConfig"

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.m + 2 * knobs.r


@dataclass
class VbLoraKnobs(Knobs):
    r: int = knob(4, "Rank of the update.", low=1, size=True)
    num_vectors: int = knob(64, "Vectors in the bank.", low=2, size=True)
    vector_length: int = knob(16, "Length of the bank's vectors: a divisor of every side.", low=1)
    topk: int = knob(2, "Vectors mixed into one piece.", low=1)


class VbLora(PeftMethod):
    id, name, order = "vb-lora", "VB-LoRA", 42
    learning_rate = 0.01
    paper = Paper("VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", "2405.15179")
    kind = "weight update"
    summary = "LoRA whose factors are tiled from mixtures of a bank of short vectors that all layers share."
    equation = (
        r"\Delta W = BA,\quad \text{each piece} = \textstyle\sum_{i\in \mathrm{top}k}\mathrm{softmax}(\ell)_i\, v_i"
    )
    knobs = VbLoraKnobs
    identity_start = False
    low_rank = False
    tensors = {"trained": {"bank": "h × b", "logits": "r(m+n)/b × h"}, "frozen": {"W": "m × n"}}
    remark = (
        "Starts near, not at, the base: bank and mixtures are random. Trained logits are counted, not the stored top k."
    )
    peft_config = "VBLoRAConfig"

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.vector_length, "vector_length")
        self.at_most(layer, knobs.topk, knobs.num_vectors, "topk")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n) // knobs.vector_length * knobs.num_vectors

    def count(self, layers: Sequence[Layer], knobs: Any) -> int:
        return super().count(layers, knobs) + knobs.num_vectors * knobs.vector_length

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


@dataclass
class RandLoraKnobs(Knobs):
    r: int = knob(32, "Rank of each random pair: more pairs, and more trained numbers, the smaller it is.", low=1)
    scale: float = knob(20.0, "The update is scaled by this over the rank's share: alpha/r.", low=0.01)


class RandLora(PeftMethod):
    id, name, order = "randlora", "RandLoRA", 43
    paper = Paper("RandLoRA: Full-rank parameter-efficient fine-tuning of large models", "2502.00987")
    kind = "weight update"
    summary = "A sum of frozen random low-rank products with trained diagonals, of full rank."
    equation = r"\Delta W = s\sum_{j=1}^{N} B_j\,\mathrm{diag}(\lambda_j)\,A\,\mathrm{diag}(\gamma_j),\ N=\lceil\min(m,n)/r\rceil"
    knobs = RandLoraKnobs
    alone = True
    tensors = {"trained": {"λ": "r × N", "γ": "N × min(m, n)"}, "frozen": {"A, B": "random, shared", "W": "m × n"}}
    remark = "The trained count falls as r grows: N·(r + min(m, n)) with N = ⌈min(m, n)/r⌉."
    peft_config = "RandLoraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        alpha = knobs.scale * knobs.r
        return {"r": knobs.r, "randlora_alpha": alpha, "projection_prng_key": seed, "save_projection": False}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        smaller = min(layer.m, layer.n)
        return -(-smaller // knobs.r) * (knobs.r + smaller)


@dataclass
class TinyLoraKnobs(Knobs):
    u: int = knob(16, "Trained numbers a layer; r² make it LoRA-XS.", low=1, size=True)
    r: int = knob(2, "Singular vectors of the weight that span the update.", low=1)


class TinyLora(PeftMethod):
    id, name, order = "tinylora", "TinyLoRA", 44
    learning_rate = 0.01
    paper = Paper("Learning to Reason in 13 Parameters (TinyLoRA)", "2602.04118")
    kind = "weight update"
    summary = "A fixed random projection of a handful of numbers, between the weight's leading singular vectors."
    equation = r"\Delta W = U_r\Sigma_r\big(\textstyle\sum_i v_i P_i\big)V_r^\top"
    knobs = TinyLoraKnobs
    tensors = {"trained": {"v": "u"}, "frozen": {"P": "u × r × r", "U": "m × r", "V": "r × n", "W": "m × n"}}
    peft_config = "TinyLoraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "u": knobs.u, "projection_seed": seed, "save_projection": False}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.at_most(layer, knobs.r, min(layer.m, layer.n), "r")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.u

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


@dataclass
class UniLoraKnobs(Knobs):
    length: int = knob(256, "Trained numbers for the whole model.", low=1, size=True)
    r: int = knob(4, "Rank of the update.", low=1)


class UniLora(PeftMethod):
    id, name, order = "unilora", "Uni-LoRA", 45
    learning_rate = 0.005
    paper = Paper("Uni-LoRA: One Vector is All You Need", "2506.00799")
    kind = "weight update"
    summary = "All LoRA factors of the model are looked up, by a fixed hash, in one trained vector."
    equation = r"\mathrm{vec}(B, A) = P\,\theta,\quad P\ \text{one nonzero a row}"
    knobs = UniLoraKnobs
    identity_start = False
    alone = True
    tensors = {"trained": {"θ": "length, once"}, "frozen": {"P": "hash", "W": "m × n"}}
    remark = "Starts near, not at, the base: both factors are looked up in the same random vector."
    peft_config = "UniLoraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "theta_d_length": knobs.length, "proj_seed": seed}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return 0

    def count(self, layers: Sequence[Layer], knobs: Any) -> int:
        return knobs.length if layers else 0

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


for row in (Vera, Pvera, VbLora, RandLora, TinyLora, UniLora):
    register(row())
