"""Rotations, scalings, biases, sparse masks, spectra and blocks. From PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.builtin import PeftMethod
from lab.methods.builtin_factors import RankKnobs
from lab.methods.spec import Knobs, Layer, Paper, knob


@dataclass
class BlockKnobs(Knobs):
    block: int = knob(8, "Side of the blocks: a divisor of the layer's sides.", low=2, size=True)


class Oft(PeftMethod):
    id, name, order = "oft", "OFT", 50
    paper = Paper("Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "2306.07280")
    kind = "multiplicative"
    summary = "Rotates the layer's inputs by a trained block-diagonal orthogonal matrix."
    equation = r"W' = W R,\quad R = \mathrm{blockdiag}\big((I+Q_i)(I-Q_i)^{-1}\big),\ Q_i^\top = -Q_i"
    knobs = BlockKnobs
    tensors = {"trained": {"Q": "n/b × b(b−1)/2"}, "frozen": {"W": "m × n"}}
    remark = (
        "PEFT makes the rotation by five terms of a Neumann series, which is orthogonal only near the start. Its"
        " convolutions do not start at the base in 0.21, so they are left out."
    )
    peft_config = "OFTConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"oft_block_size": knobs.block, "r": 0}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.block, "block", layer.n)

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.n // knobs.block * (knobs.block * (knobs.block - 1) // 2)


class Boft(PeftMethod):
    id, name, order = "boft", "BOFT", 51
    paper = Paper("Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", "2311.06243")
    kind = "multiplicative"
    summary = "OFT with butterfly-ordered blocks and a trained scale of every output row."
    equation = r"W' = \mathrm{diag}(s)\,W \textstyle\prod_k R_k"
    knobs = BlockKnobs
    conv = True
    tensors = {"trained": {"R": "n/b × b × b", "s": "m"}, "frozen": {"W": "m × n"}}
    remark = "One butterfly factor: PEFT allows more only with its CUDA extension."
    peft_config = "BOFTConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"boft_block_size": knobs.block, "boft_n_butterfly_factor": 1}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.block, "block", layer.n)

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.n * knobs.block + layer.m


@dataclass
class HraKnobs(Knobs):
    r: int = knob(4, "Number of reflections: even.", low=2, size=True)


class Hra(PeftMethod):
    id, name, order = "hra", "HRA", 52
    paper = Paper(
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        "2405.17484",
    )
    kind = "multiplicative"
    summary = "Multiplies the weight by a chain of trained Householder reflections."
    equation = r"W' = W \textstyle\prod_{i=1}^{r}\big(I - 2\,u_iu_i^\top/\lVert u_i\rVert^2\big)"
    knobs = HraKnobs
    conv = True
    tensors = {"trained": {"u": "n × r"}, "frozen": {"W": "m × n"}}
    peft_config = "HRAConfig"

    def check(self, layer: Layer, knobs: Any) -> None:
        if knobs.r % 2:
            raise LabError(f"HRA needs an even r, so that the reflections cancel at the start, got {knobs.r}.")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * layer.n

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


class Psoft(PeftMethod):
    id, name, order = "psoft", "PSOFT", 53
    learning_rate = 0.005
    paper = Paper("Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", "2505.11235")
    kind = "multiplicative"
    summary = "Rotates and scales the weight inside the subspace of its leading singular vectors."
    equation = r"\Delta W = A\,(\mathrm{diag}(\alpha)\,R\,\mathrm{diag}(\beta) - I)\,B,\quad AB = U_r\Sigma_rV_r^\top"
    knobs = RankKnobs
    tensors = {"trained": {"R": "r(r−1)/2", "α": "r", "β": "r"}, "frozen": {"A": "m × r", "B": "r × n", "W": "m × n"}}
    peft_config = "PsoftConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "psoft_alpha": knobs.r, "random_seed": seed}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.at_most(layer, knobs.r, min(layer.m, layer.n), "r")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (knobs.r - 1) // 2 + 2 * knobs.r

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


@dataclass
class RoadKnobs(Knobs):
    group: int = knob(8, "Rows that are rotated together: an even divisor of the output side.", low=2)


class Road(PeftMethod):
    id, name, order = "road", "RoAd", 54
    learning_rate = 0.003
    paper = Paper(
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", "2409.00119"
    )
    kind = "multiplicative"
    summary = "Rotates and scales pairs of the layer's outputs."
    equation = r"W' = \mathrm{blockdiag}\Big(\alpha_i\begin{pmatrix}\cos\theta_i & -\sin\theta_i\\ \sin\theta_i & \cos\theta_i\end{pmatrix}\Big) W"
    knobs = RoadKnobs
    tensors = {"trained": {"θ": "m/2", "α": "m/2"}, "frozen": {"W": "m × n"}}
    peft_config = "RoadConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"variant": "road_1", "group_size": knobs.group}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.group, "group", layer.m)
        self.must_divide(layer, 2, "Pairs in a group: 2", knobs.group)

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.m


class Ia3(PeftMethod):
    id, name, order = "ia3", "IA³", 55
    learning_rate = 0.01
    paper = Paper(
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", "2205.05638"
    )
    kind = "multiplicative"
    summary = "Scales every output of the layer by a trained number."
    equation = r"W' = \mathrm{diag}(l)\,W"
    conv = True
    tensors = {"trained": {"l": "m"}, "frozen": {"W": "m × n"}}
    remark = "Outputs are scaled on every layer, where the paper scales a feed-forward layer's inputs."
    peft_config = "IA3Config"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"feedforward_modules": []}

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.m


class BitFit(PeftMethod):
    id, name, order = "bitfit", "BitFit", 56
    learning_rate = 0.005
    paper = Paper(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", "2106.10199"
    )
    kind = "bias"
    summary = "Trains a bias of every layer and no weight at all."
    equation = r"W' = W,\quad b' = b + \Delta b"
    mergeable = False
    tensors = {"trained": {"Δb": "m"}, "frozen": {"W": "m × n"}}
    remark = "PEFT's BEFT: layers without a bias get one, so it cannot always be merged."
    peft_config = "BeftConfig"

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.m

    def rank(self, layer: Layer, knobs: Any) -> int:
        return 0


class Shira(PeftMethod):
    id, name, order = "shira", "SHiRA", 57
    paper = Paper("Sparse High Rank Adapters", "2406.13175")
    kind = "sparse"
    summary = "Trains a fixed random set of the weight's own entries."
    equation = r"\Delta W = M \odot S,\quad \lVert M\rVert_0 = r(m+n)"
    knobs = RankKnobs
    tensors = {"trained": {"S": "r(m + n)"}, "frozen": {"M": "r(m + n) positions", "W": "m × n"}}
    peft_config = "ShiraConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.r, "random_seed": seed}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.at_most(layer, knobs.r, layer.m * layer.n // (layer.m + layer.n), "r")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * (layer.m + layer.n)


@dataclass
class SpectrumKnobs(Knobs):
    n_frequency: int = knob(256, "Trained coefficients a layer.", low=1, size=True)
    scaling: float = knob(25.0, "Factor of the update.", low=1e-3)


class FourierFt(PeftMethod):
    id, name, order = "fourierft", "FourierFT", 58
    learning_rate = 0.05
    paper = Paper("Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "2405.03003")
    kind = "frequency"
    summary = "The update is the inverse Fourier transform of a few trained coefficients at random places."
    equation = r"\Delta W = \alpha\,\mathrm{Re}\,\mathcal F^{-1}(S)"
    knobs = SpectrumKnobs
    tensors = {"trained": {"S": "n_frequency"}, "frozen": {"places": "n_frequency", "W": "m × n"}}
    remark = "Started at zero, not at PEFT's normal numbers, so that training starts at the base."
    peft_config = "FourierFTConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {
            "n_frequency": knobs.n_frequency,
            "scaling": knobs.scaling,
            "random_loc_seed": seed,
            "init_weights": True,
        }

    def check(self, layer: Layer, knobs: Any) -> None:
        self.at_most(layer, knobs.n_frequency, layer.m * layer.n, "n_frequency")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.n_frequency

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(2 * knobs.n_frequency, layer.m, layer.n)


class WaveFt(FourierFt):
    id, name, order = "waveft", "WaveFT", 59
    paper = Paper("Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", "2505.12532")
    summary = "The update is the inverse wavelet transform of a few trained coefficients at random places."
    equation = r"\Delta W = \alpha\,\mathcal W^{-1}(S)"
    remark = ""
    peft_config = "WaveFTConfig"

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(layer.m, layer.n)


@dataclass
class C3aKnobs(Knobs):
    block: int = knob(16, "Side of the circulant blocks: a divisor of both sides; larger means fewer numbers.", low=1)


class C3a(PeftMethod):
    id, name, order = "c3a", "C³A", 60
    learning_rate = 0.1
    paper = Paper("Parameter-Efficient Fine-Tuning via Circular Convolution", "2407.19342")
    kind = "frequency"
    summary = "The update is made of circulant blocks, each given by its first row."
    equation = r"\Delta W_{ij} = \mathrm{circ}(w_{ij})"
    knobs = C3aKnobs
    tensors = {"trained": {"w": "m/b × n/b × b"}, "frozen": {"W": "m × n"}}
    remark = "Started at zero, not at PEFT's Xavier numbers, so that training starts at the base."
    peft_config = "C3AConfig"

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"block_size": knobs.block, "init_weights": True}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.block, "block")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return layer.m * layer.n // knobs.block


class Miss(PeftMethod):
    id, name, order = "miss", "MiSS", 61
    paper = Paper("MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "2409.15371")
    kind = "weight update"
    summary = "One trained shard of r columns, repeated over the layer's inputs."
    equation = r"\Delta W = D\,[\,I\ I\ \cdots\ I\,]"
    knobs = RankKnobs
    tensors = {"trained": {"D": "r × m"}, "frozen": {"W": "m × n"}}
    peft_config = "MissConfig"

    def check(self, layer: Layer, knobs: Any) -> None:
        self.at_most(layer, knobs.r, layer.n, "r")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.r * layer.m

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(knobs.r, layer.m, layer.n)


@dataclass
class BoneKnobs(Knobs):
    block: int = knob(8, "Side of the blocks: a divisor of both sides.", low=1, size=True)


class Bone(Miss):
    id, name, order = "bone", "Bone", 62
    summary = "Blocks of the weight are changed by trained blocks, affinely in the weight itself."
    equation = r"W'_{ij} = W_{ij} + W_{ij} D_i + D_i"
    knobs = BoneKnobs
    tensors = {"trained": {"D": "m/b × b × b"}, "frozen": {"W": "m × n"}}
    remark = "PEFT's MiSS with the block-affine start 'bat'; the later paper of the same id renamed the method."

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        return {"r": knobs.block, "init_weights": "bat"}

    def check(self, layer: Layer, knobs: Any) -> None:
        self.must_divide(layer, knobs.block, "block")

    def count_layer(self, layer: Layer, knobs: Any) -> int:
        return knobs.block * layer.m

    def rank(self, layer: Layer, knobs: Any) -> int:
        return min(layer.m, layer.n)


for row in (Oft, Boft, Hra, Psoft, Road, Ia3, BitFit, Shira, FourierFt, WaveFt, C3a, Miss, Bone):
    register(row())
