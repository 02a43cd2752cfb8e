"""TLoRA: the weight transformed by a tensor ring, plus a tensor-ring residual (Tao et al. 2025, arXiv 2501.08727, ICCV 2025).

W' = W·T + Δ. T (n×n) is a tensor-ring matrix: with n = n₁⋯n_D, T[i₁…i_D, j₁…j_D] = tr(A¹[i₁, j₁]⋯A^D[i_D, j_D]), cores
A^d (n_d, n_d, R_T, R_T). Δ is a tensor ring over m₁⋯m_D and n₁⋯n_D: Δ[i, j] = tr(B¹[i₁]⋯B^D[i_D]·C¹[j₁]⋯C^D[j_D]), cores
(m_d, R, R) and (n_d, R, R). T starts at the identity (every A^d[:, :, ρ, ρ'] = I/R_T), Δ at zero (B¹ = 0), the other
cores at N(0, 1/R): the paper asks for the scale Θ(√n_out / n_in) without naming the sizes; 1/√R keeps a product of
cores at the size of one (not settled). The transform is dense and of full rank with few numbers; the residual has rank R² at most.
The authors' code (github.com/taozerui/tlora_diffusion) is in no index here and could not be read: the form is the paper's, its TLoRA(2, 6).
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
class TloraKnobs(Knobs):
    r_transform: int = knob(2, "Ring rank of the transform.", low=1)
    r: int = knob(6, "Ring rank of the residual; its rank as a matrix is at most the square.", low=1, size=True)
    cores: int = knob(3, "Into how many factors each side of the weight is split.", low=1, high=8)


class Tlora(OwnMethod):
    """TLoRA: TloraConfig(r_transform, r, cores)."""

    id, name = "tlora", "TLoRA"
    paper = Paper(
        "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
        "2501.08727",
    )
    kind = "multiplicative"
    summary = "The weight multiplied by a dense transform of few numbers, plus a tensor-ring residual."
    equation = r"W' = W T + \Delta,\quad T_{ij} = \mathrm{tr}(A^1_{i_1 j_1} \cdots A^D_{i_D j_D}),\ \Delta_{ij} = \mathrm{tr}(B^1_{i_1} \cdots B^D_{i_D} C^1_{j_1} \cdots C^D_{j_D})"
    knobs = TloraKnobs
    learning_rate = 1e-4
    uses_weight = True
    tensors = {
        "trained": {"transform": "n_d × n_d × R_T²", "rows": "m_d × R²", "columns": "n_d × R²"},
        "frozen": {"W": "m × n"},
    }
    remark = "The authors' code could not be read: the split of the sides into factors and the cores' start are ours."

    def count_layer(self, layer: Layer, knobs: TloraKnobs) -> int:
        rows, columns = split(layer.m, knobs.cores), split(layer.n, knobs.cores)
        return knobs.r_transform**2 * sum(d * d for d in columns) + knobs.r**2 * (sum(rows) + sum(columns))

    def init(self, start: Start, knobs: TloraKnobs) -> Tensors:
        import torch

        R, made = knobs.r, {}
        rows, columns = split(start.layer.m, knobs.cores), split(start.layer.n, knobs.cores)
        for d, size in enumerate(columns):
            eye = torch.eye(size, device=start.device) / knobs.r_transform
            made[f"transform{d}"] = eye[:, :, None, None].repeat(1, 1, knobs.r_transform, knobs.r_transform)
        for d, size in enumerate(rows):
            made[f"rows{d}"] = start.randn(size, R, R, scale=R**-0.5) if d else start.zeros(size, R, R)
        for d, size in enumerate(columns):
            made[f"columns{d}"] = start.randn(size, R, R, scale=R**-0.5)
        return Tensors(made)

    def residual(self, t: Mapping[str, torch.Tensor], knobs: TloraKnobs) -> tuple[torch.Tensor, torch.Tensor]:
        """Δ as (m, R²)·(R², n): tr(P·Q) = Σ_ab P[a, b]·Q[b, a]."""
        P, Q = (chain([t[f"{side}{d}"] for d in range(knobs.cores)]) for side in ("rows", "columns"))
        return P.flatten(1), Q.transpose(1, 2).flatten(1).T

    def transform(self, t: Mapping[str, torch.Tensor], knobs: TloraKnobs) -> torch.Tensor:
        """T (n, n)."""
        import torch

        cores = [t[f"transform{d}"] for d in range(knobs.cores)]
        product = cores[0]  # (i, j, R, R)
        for core in cores[1:]:
            grown = torch.einsum("ijab,klbc->ikjlac", product, core)
            i, k, j, l = grown.shape[:4]
            product = grown.reshape(i * k, j * l, *grown.shape[4:])
        return product.diagonal(dim1=2, dim2=3).sum(-1)

    def delta(self, t: Mapping[str, torch.Tensor], knobs: TloraKnobs, layer: Layer) -> torch.Tensor:
        import torch

        P, Q = self.residual(t, knobs)
        T = self.transform(t, knobs)
        return t["weight"] @ (T - torch.eye(layer.n, device=T.device)) + P @ Q


def chain(cores: list[torch.Tensor]) -> torch.Tensor:
    """Products of cores (n_d, R, R) over all index tuples: (n₁⋯n_D, R, R), the last index fastest."""
    import torch

    product = cores[0]
    for core in cores[1:]:
        product = torch.einsum("iab,jbc->ijac", product, core).flatten(0, 1)
    return product


def split(size: int, parts: int) -> list[int]:
    """`size` as a product of `parts` whole numbers, as equal as its divisors allow, in ascending order."""
    factors = []
    while parts > 1:
        target = size ** (1 / parts)
        divisors = (d for d in range(1, int(target + 1e-9) + 1) if size % d == 0)
        factors.append(max(divisors))
        size, parts = size // factors[-1], parts - 1
    return sorted([*factors, size])


register(Tlora())
