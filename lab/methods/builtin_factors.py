"""Updates made of other products than LoRA's: Hadamard, Kronecker, by blocks, by the weight itself. From PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lab.methods import register
from lab.methods.builtin import PeftMethod
from lab.methods.spec import Knobs, Layer, Paper, knob

LYCORIS = Paper("Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", "2309.14859")


@dataclass
class RankKnobs(Knobs):
    r: int = knob(4, "Rank of the factors.", low=1, size=True)


class Loha(PeftMethod):
    id, name, order = "loha", "LoHa", 30
    paper = Paper("FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", "2108.06098")
    kind = "weight update"
    summary = "Multiplies two low-rank products entry by entry, which reaches rank r²."
    equation = r"\Delta W = s\,(B_1A_1)\odot(B_2A_2)"
    knobs = RankKnobs
    conv = True
    tensors = {"trained": {"B₁, B₂": "m × r", "A₁, A₂": "r × n"}, "frozen": {"W": "m × n"}}
    peft_config = "LoHaConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "alpha": knobs.r}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return 2 * knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r**2, layer.m, layer.n)


def split(size: int, factor: int) -> tuple[int, int]:
    """PEFT's factorisation of a dimension into (small, large): near `factor`, or near the square root when it is -1."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    factor = size if factor == -1 else factor
    small, large = 1, size
    while small < large:
        new = next(i for i in range(small + 1, size + 1) if size % i == 0)
        if new + size // new > small + large or new > factor:
            break
        small, large = new, size // new
    return min(small, large), max(small, large)


@dataclass
class LokrKnobs(Knobs):
    r: int = knob(4, "Rank of the larger factor; half its side or more makes it full.", low=1, size=True)
    factor: int = knob(-1, "Size of the smaller factor's sides; -1 takes the divisor near the square root.", low=-1)


class Lokr(PeftMethod):
    id, name, order = "lokr", "LoKr", 31
    paper = LYCORIS
    kind = "weight update"
    summary = "A Kronecker product of a small matrix and a larger low-rank one."
    equation = r"\Delta W = s\,C \otimes (D_b D_a)"
    knobs = LokrKnobs
    conv = True
    tensors = {"trained": {"C": "m₁ × n₁", "D_b": "m₂ × r", "D_a": "r × n₂"}, "frozen": {"W": "m × n"}}
    remark = "PEFT scales by alpha/r even when the factor is full, so alpha is set to r."
    peft_config = "LoKrConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        r = self.effective_rank(knobs)
        return {"r": r, "alpha": r, "decompose_factor": knobs.factor}

    def effective_rank(self, knobs: Any) -> int:
        return knobs.r

    def shapes(self, layer: Layer, knobs: Any) -> tuple[int, int, int, int, int, bool]:
        """(m₁, m₂, n₁, n₂, kernel size, larger factor full)."""
        m1, m2 = split(layer.out, knobs.factor)
        n1, n2 = split(layer.in_, knobs.factor)
        return m1, m2, n1, n2, layer.n // layer.in_, self.effective_rank(knobs) >= max(m2, n2) / 2

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        m1, m2, n1, n2, k, full = self.shapes(layer, knobs)
        return m1 * n1 + (m2 * n2 * k if full else knobs.r * (m2 + n2 * k))

    def rank(self, layer: Layer, knobs: Any) -> int:
        m1, m2, n1, n2, k, full = self.shapes(layer, knobs)
        inner = min(m2, n2 * k) if full else min(knobs.r, m2, n2 * k)
        return min(min(m1, n1) * inner, layer.m, layer.n)


@dataclass
class DiffuseKronaKnobs(Knobs):
    factor: int = knob(-1, "Size of the smaller factor's sides; -1 takes the divisor near the square root.", low=-1)


class DiffuseKrona(Lokr):
    id, name, order = "diffusekrona", "DiffuseKronA", 32
    paper = Paper(
        "DiffuseKronA: A Parameter Efficient Fine-tuning Method for Personalized Diffusion Models", "2402.17412"
    )
    summary = "A Kronecker product of two full trained matrices."
    equation = r"\Delta W = A \otimes B"
    knobs = DiffuseKronaKnobs
    tensors = {"trained": {"A": "m₁ × n₁", "B": "m₂ × n₂"}, "frozen": {"W": "m × n"}}
    remark = "PEFT's LoKr with full factors; it splits both sides by one factor, where the paper chooses each freely."

    def effective_rank(self, knobs: Any) -> int:
        return 100_000


class Hira(PeftMethod):
    id, name, order = "hira", "HiRA", 33
    paper = Paper(
        "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation", "https://openreview.net/forum?id=TwJrTz9cRS"
    )
    kind = "weight update"
    summary = "A low-rank product multiplied entry by entry with the weight itself, so of full rank."
    equation = r"\Delta W = W \odot (BA)"
    knobs = RankKnobs
    conv = True
    tensors = {"trained": {"B": "m × r", "A": "r × n"}, "frozen": {"W": "m × n"}}
    peft_config = "HiraConfig"

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n)


@dataclass
class DeloraKnobs(RankKnobs):
    bound: int = knob(15, "Start of the trained bound on the update's norm.", low=1)


class Delora(PeftMethod):
    id, name, order = "delora", "DeLoRA", 34
    paper = Paper("Decoupling Angles and Strength in Low-rank Adaptation", "2503.18225")
    kind = "weight update"
    summary = "LoRA with normalised directions and one trained strength, so the update's norm is bounded."
    equation = r"\Delta W = \tfrac{\lambda \lVert W\rVert}{r}\, B\,\mathrm{diag}\!\big(\tfrac{1}{\lVert b_i\rVert\lVert a_i\rVert}\big) A"
    knobs = DeloraKnobs
    tensors = {"trained": {"B": "m × r", "A": "r × n", "λ": "1"}, "frozen": {"W": "m × n"}}
    peft_config = "DeloraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "delora_lambda": knobs.bound}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n) + 1

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


@dataclass
class GraloraKnobs(RankKnobs):
    blocks: int = knob(2, "Blocks a side: k² small LoRAs.", low=1)


class Gralora(PeftMethod):
    id, name, order = "gralora", "GraLoRA", 35
    paper = Paper("GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", "2505.20355")
    kind = "weight update"
    summary = "The weight cut into k × k blocks, each with a LoRA of its own."
    equation = r"\Delta W_{ij} = s\,B_{ij}A_{ij}"
    knobs = GraloraKnobs
    tensors = {"trained": {"B": "k × r × m/k", "A": "k × n/k × r"}, "frozen": {"W": "m × n"}}
    peft_config = "GraloraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "alpha": knobs.r, "gralora_k": knobs.blocks}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.blocks, "blocks")
        self.must_divide(layer, knobs.blocks, "blocks", knobs.r)

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n)

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r * knobs.blocks, layer.m, layer.n)


class Deft(PeftMethod):
    id, name, order = "deft", "DEFT", 36
    paper = Paper(
        "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models",
        "https://openreview.net/forum?id=FSHrinMArK",
    )
    kind = "weight update"
    summary = "Takes the weight's part in a trained subspace away and puts a trained one in its place."
    equation = r"W' = W - P_\perp W + P_\perp R"
    knobs = RankKnobs
    tensors = {"trained": {"P": "m × r", "R": "r × n"}, "frozen": {"W": "m × n"}}
    peft_config = "DeftConfig"

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m) * (layer.m + layer.n)


class Peanut(PeftMethod):
    id, name, order = "peanut", "PEANuT", 37
    paper = Paper("PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", "2410.01870")
    kind = "weight update"
    summary = "The update is a small neural network's output whose input is the weight itself."
    equation = r"\Delta W = s\,\sigma(WA)\,B"
    knobs = RankKnobs
    tensors = {"trained": {"A": "m × r", "B": "r × m"}, "frozen": {"W": "m × n"}}
    peft_config = "PeanutConfig"

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return 2 * knobs.r * layer.m

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


for row in (Loha, Lokr, DiffuseKrona, Hira, Delora, Gralora, Deft, Peanut):
    register(row())
