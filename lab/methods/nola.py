"""NOLA: networks as linear combinations of low-rank random bases (Koohpayegani et al., ICLR 2024, arXiv 2310.02556).

ΔW = (c/r)·B·A with A = A₀ + Σ_{i≤k} αᵢ·Aᵢ (r×n) and B = Σ_{j≤l} βⱼ·Bⱼ (m×r) over frozen pseudo-random bases; only the
k + l coefficients are trained and stored, whatever m, n and r are. The paper writes the product the other way round
(α for the m×r factor); this follows the authors' code (github.com/UCDvision/NOLA, commit e009fdc, gpt/src/model_nola.py
and, the same, llama/qlora/peft/tuners/lora.py: `GenerateParams`, `NOLALinear`), where α belongs to lora_A, a basis is
U(−1, 1)/√k drawn anew for each layer and factor, and the product is scaled by alpha/r (c here).

A₀ is a frozen random matrix (uniform in ±1/√n) and α = β = 0 at the start, as there: ΔW is zero and the gradient of β is
not. The paper's text has no A₀; with α = β = 0 alone nothing would ever move. The ViT code (commit 739fcb9, vit/NOLA.py,
`NOLA2`) starts away from the base instead: no A₀, α = 1/k and β = 1/l; it seeds every layer alike, so that layers of
one shape have one basis (`shared` here). The paper has c = 1 for GPT-2 and 4 for LLaMA; the released script
(gpt/examples/NLG/scripts/finetune_gpt2m_e2e_qv_nola.sh) takes alpha = r = 8, a factor of 1.

A convolution's kernel is reshaped to the nearest to square matrix its size allows (the paper's appendix), so its
update is of low rank in that shape only. Coefficients may be quantised to 8, 4, 3 or 2 bits (the paper's Table 4):
`ptq` when they are saved, `qat` in every forward pass with straight-through gradients. Of the quantiser the paper says
only that it follows Rastegari et al. 2016 and Jacob et al. 2018; here it is the latter's, uniform over each vector's own
range, which is what its smallest and largest codes stand for. The release trains no quantised NOLA; the helper it has
(vit/utils/utils.py, `normalize_int`) scales by the largest magnitude, for 8 and 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods import register
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Knobs, Layer, Paper, knob

if TYPE_CHECKING:
    import torch


@dataclass
class NolaKnobs(Knobs):
    r: int = knob(8, "Rank of the update; it costs no parameters.", low=1)
    k: int = knob(128, "Coefficients of the first factor, A.", low=1, size=True)
    l: int = knob(128, "Coefficients of the second factor, B.", low=1, size=True)
    basis: str = knob(
        "hadamard",
        "The frozen basis: uniform numbers a layer, the same for all layers of a shape, or Walsh–Hadamard rows.",
        choices=("uniform", "shared", "hadamard"),
    )
    c: float = knob(1.0, "The update is scaled by c/r.", low=1e-6)
    quant_bits: int = knob(0, "Bits of a stored coefficient: 8, 4, 3, 2, or 0 for no quantisation.", low=0, high=8)
    quant: str = knob("ptq", "Quantise when saving (ptq), or in every forward pass too (qat).", choices=("ptq", "qat"))
    cache_mib: int = knob(64, "Memory that all layers' bases may keep between steps, in MiB.", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quant_bits not in (0, 2, 3, 4, 8):
            raise LabError(f"quant_bits must be 8, 4, 3, 2, or 0 for none, got {self.quant_bits}.")


def near_square(size: int) -> tuple[int, int]:
    """The two factors of `size` that are nearest to each other, the smaller first."""
    return next((p, size // p) for p in range(int(size**0.5), 0, -1) if size % p == 0)


class Nola(OwnMethod):
    """Low-rank factors as combinations of random bases: NolaConfig(r, k, l, seed, basis, c, quant_bits, quant, cache_mib)."""

    id, name, order = "nola", "NOLA", 3
    learning_rate = 0.01
    paper = Paper("NOLA: Compressing LoRA using Linear Combination of Random Basis", "2310.02556")
    kind = "weight update"
    summary = "LoRA whose factors are linear combinations of frozen random matrices: only the coefficients are trained."
    equation = r"\Delta W = \tfrac{c}{r}\Big(\sum_{j=1}^{l}\beta_j B_j\Big)\Big(A_0 + \sum_{i=1}^{k}\alpha_i A_i\Big)"
    knobs = NolaKnobs
    low_rank = True
    positional = ("r", "k", "l", "seed", "basis", "c", "quant_bits", "quant", "cache_mib")
    tensors = {
        "trained": {"α": "k", "β": "l"},
        "frozen": {"A_i": "k of r × n, from the seed", "B_j": "l of m × r, from the seed", "W": "m × n"},
    }
    remark = (
        "The frozen A₀ is in the authors' GPT and LLaMA code, not in the paper's text; without it nothing would move."
        " Of the quantiser the paper says only that it follows Jacob et al. 2018: here uniform over each vector's range."
    )

    def shape(self, layer: Layer) -> tuple[int, int]:
        """The matrix the update is of low rank in: the weight's own for a linear layer, near-square for a convolution."""
        return near_square(layer.m * layer.n) if layer.kernel else (layer.m, layer.n)

    def check(self, layer: Layer, knobs: NolaKnobs) -> None:
        m, n = self.shape(layer)
        if knobs.r > min(m, n):
            raise LabError(f"r is {knobs.r}, but layer {layer.name} is {m}×{n}: take at most {min(m, n)}.")
        for name, count, entries in (("k", knobs.k, knobs.r * n), ("l", knobs.l, knobs.r * m)):
            if knobs.basis == "hadamard" and count > entries:
                raise LabError(
                    f"{name} is {count}, more than the {entries} entries it combines on layer {layer.name}: lower it."
                )

    def count_layer(self, layer: Layer, knobs: NolaKnobs) -> int:
        return knobs.k + knobs.l

    def rank(self, layer: Layer, knobs: NolaKnobs) -> int:
        return min(layer.m, layer.n) if layer.kernel else min(knobs.r, layer.m, layer.n)

    # -- the update ------------------------------------------------------------------------------------------
    def cached(self, layer: Layer, knobs: NolaKnobs) -> int:
        a, b, both = knobs.r * layer.n, layer.m * knobs.r, knobs.k + knobs.l
        return 4 * a + (8 * both + a + b if knobs.basis == "hadamard" else knobs.k * a + knobs.l * b)

    def init(self, start: Start, knobs: NolaKnobs) -> Tensors:
        return Tensors({"alpha": start.zeros(knobs.k), "beta": start.zeros(knobs.l)})

    def combined(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """(B (m, r), A (r, n)) of the layer's `shape`, the scale in B."""
        from lab.methods import _basis

        alpha, beta, maps, A0 = self.parts(t, knobs, layer)
        A, B = _basis.combine_pair(alpha, beta, maps)
        return B.view(-1, knobs.r), A.view(knobs.r, -1) + A0

    def parts(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> tuple[Any, Any, Any, torch.Tensor]:
        """(α, β, what combines them with the scale in B, A₀ (r, n))."""
        from lab import counter
        from lab.methods import _basis, _codes

        m, n = self.shape(layer)
        alpha, beta = t["alpha"], t["beta"]
        if knobs.quant == "qat" and knobs.quant_bits:
            alpha, beta = (_codes.fake_quantise(x, knobs.quant_bits) for x in (alpha, beta))
        kind = "hadamard" if knobs.basis == "hadamard" else "uniform"
        whose = f"{m}x{n}" if knobs.basis == "shared" else layer.name
        a, b, a0 = (counter.key("nola", knobs.seed, whose, side) for side in ("a", "b", "a0"))
        counts, sizes, limit = (alpha.numel(), beta.numel()), (knobs.r * n, m * knobs.r), knobs.cache_mib << 20
        maps = _basis.pair(counts, kind, (a, b), sizes, alpha.device, limit, knobs.c / knobs.r)
        return alpha, beta, maps, _basis.start_factor(a0, knobs.r, n, alpha.device, limit)

    def by_hand(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> Any:
        from lab.methods._fused import ByHand

        alpha, beta, maps, A0 = self.parts(t, knobs, layer)
        r = knobs.r

        def forward(c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            A, B = maps.forward(c, d)
            return A.view(r, -1) + A0, B.view(-1, r).T

        def backward(to_a: torch.Tensor, to_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return maps.backward(to_a.reshape(-1), to_rows.T.reshape(-1))

        return ByHand((alpha, beta), forward, backward)

    def dense(self, layer: Layer, knobs: NolaKnobs) -> bool:
        return layer.kernel is not None

    def factors(self, t: Mapping[str, torch.Tensor], knobs: NolaKnobs, layer: Layer) -> Any:
        return None if layer.kernel else self.combined(t, knobs, layer)

    def delta(self, t: Mapping[str, torch.Tensor], knobs: NolaKnobs, layer: Layer) -> torch.Tensor:
        B, A = self.combined(t, knobs, layer)
        return (B @ A).view(layer.m, layer.n)

    # -- quantised files ---------------------------------------------------------------------------------------
    def packs(self, knobs: NolaKnobs) -> bool:
        return knobs.quant_bits > 0

    def pack(self, tensors: dict[str, torch.Tensor], knobs: NolaKnobs) -> dict[str, torch.Tensor]:
        """All coefficient vectors as one stream of codes, and (smallest, step) of each, in the order of the names."""
        import torch

        from lab.methods import _codes

        found = [_codes.quantise(v.detach().float().cpu(), knobs.quant_bits) for _, v in sorted(tensors.items())]
        return {
            "codes": _codes.pack(torch.cat([codes for codes, _, _ in found]), knobs.quant_bits),
            "ranges": torch.stack([torch.stack((low, step)) for _, low, step in found]),
        }

    def unpack(
        self, packed: Mapping[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], knobs: NolaKnobs
    ) -> dict[str, torch.Tensor]:
        """The coefficient vectors by name. Raises LabError when the file holds another number of them."""
        from lab.methods import _codes

        total = sum(size for (size,) in shapes.values())
        codes, ranges = packed.get("codes"), packed.get("ranges")
        if codes is None or ranges is None or codes.numel() != -(-total * knobs.quant_bits // 8):
            raise LabError("The adapter file's packed coefficients do not fit this model: it was made for another one.")
        if tuple(ranges.shape) != (len(shapes), 2):
            raise LabError("The adapter file's packed coefficients have no range each: it was made for another model.")
        values = _codes.unpack(codes, knobs.quant_bits, total).float()
        parts = values.split([size for _, (size,) in sorted(shapes.items())])
        return {
            name: low + step * part for name, part, (low, step) in zip(sorted(shapes), parts, ranges.cpu(), strict=True)
        }


nola = register(Nola())
