"""Singular vectors of a base's weights: exact, signed by a rule, and kept on disk by the weight's hash."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch


class Basis(NamedTuple):
    """W ≈ U·diag(S)·Vh: U (m, r), S (r,) descending, Vh (r, n), float32, on the weight's device."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def signed(U: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pair with the entry of largest magnitude of each column of U positive, so that signs reproduce."""
    rows = U.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(U.gather(0, rows) < 0, -1.0, 1.0).to(U.dtype)  # (1, r)
    return U * sign, Vh * sign.T


def exact(weight: torch.Tensor) -> Basis:
    """Full SVD in double precision by `torch.linalg.svd`: the reference."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    U, Vh = signed(U, Vh)
    return Basis(U.float(), S.float(), Vh.float())


def by_gram(weight: torch.Tensor) -> Basis | None:
    """Full SVD by the eigen-decomposition of the smaller Gram matrix in double precision.

    WᵀW = V·Σ²·Vᵀ loses what lies below σ₁·10⁻⁸, far under float32's own 10⁻⁷: safe unless W is ill-conditioned.
    The other side is W·V/σ. None when it is not safe: the caller takes the SVD.
    """
    m, n = weight.shape
    W = weight.double()
    if m < n:
        flipped = by_gram(weight.T)
        if flipped is None:
            return None
        U, Vh = signed(flipped.Vh.T.contiguous(), flipped.U.T.contiguous())
        return Basis(U, flipped.S, Vh)
    values, vectors = torch.linalg.eigh(W.T @ W)
    S = values.flip(0).clamp_min(0).sqrt()
    if not bool(S[-1] > 1e-6 * S[0]):
        return None
    V = vectors.flip(1)
    U = (W @ V) / S
    U, Vh = signed(U, V.T)
    return Basis(U.float(), S.float(), Vh.float())


def factorise(weight: torch.Tensor) -> Basis:
    """All singular triplets of a finite (m, n) matrix, the Gram way where it is safe."""
    return by_gram(weight) or exact(weight)


def cache_folder() -> Path:
    """LAB_HOME/cache, or the platform's cache folder."""
    if home := os.environ.get("LAB_HOME"):
        return Path(home) / "cache" / "svd"
    import platformdirs

    return Path(platformdirs.user_cache_dir("nora-lab")) / "svd"


def digest(weight: torch.Tensor) -> str:
    """Hash of a matrix's shape and float32 bytes."""
    data = weight.detach().float().contiguous().cpu()
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16, key=repr(tuple(data.shape)).encode()).hexdigest()


def basis(weight: torch.Tensor, r: int, *, smallest: bool = False, cache: bool = True) -> Basis:
    """The r largest (or smallest, still in descending order) singular triplets of `weight` (m, n), r ≤ min(m, n).

    With `cache`, what is once computed is read back from `cache_folder()`; a file that cannot be read or written is
    no error: the factorisation is then made again.
    """
    path = cache_folder() / f"{digest(weight)}-{'min' if smallest else 'max'}{r}.safetensors"
    if cache and (found := _read(path)) is not None and found.S.numel() == r:
        return Basis(*(x.to(weight.device) for x in found))
    full = factorise(weight)
    part = slice(full.S.numel() - r, None) if smallest else slice(0, r)
    cut = Basis(  # copies: a view would keep all of it alive
        *(x.clone(memory_format=torch.contiguous_format) for x in (full.U[:, part], full.S[part], full.Vh[part]))
    )
    if cache:
        _write(path, cut)
    return cut


def _read(path: Path) -> Basis | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        return Basis(found["U"], found["S"], found["Vh"])
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, found: Basis) -> None:
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
            part.write(save({k: v.cpu() for k, v in found._asdict().items()}))
        Path(part.name).replace(path)  # whole or not at all, whoever else writes it
    except OSError:
        return
