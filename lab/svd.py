"""Singular vectors of a base's weights: exact, signed by a rule, and kept on disk by the weight's hash."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ALL = slice(None)


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


def by_gram(weight: torch.Tensor, part: slice = ALL) -> Basis | None:
    """SVD by the eigen-decomposition of the smaller Gram matrix in double precision; of it the triplets in `part`.

    WᵀW = V·Σ²·Vᵀ loses what lies below σ₁·10⁻⁸, far under float32's own 10⁻⁷: safe unless what is wanted is
    ill-conditioned. The other side is W·V/σ, in double precision too: rounded to single, the same numbers come out
    of every run, which single-precision products do not promise. None when it is not safe: the caller takes the SVD.

    For most of the spectrum no faster way was found that is as exact. Seconds of one thread at 1280×1280: `eigh` in double
    0.44, in single 0.23, single-precision SVD 0.48, a product of two such matrices in double 0.09. So the decomposition
    alone takes the SVD's time, and one in single precision with the four products that refine it takes more.
    """
    m, n = weight.shape
    if m < n:
        flipped = by_gram(weight.T, part)
        if flipped is None:
            return None
        U, Vh = signed(flipped.Vh.T.contiguous(), flipped.U.T.contiguous())
        return Basis(U, flipped.S, Vh)
    W = weight.double()
    values, vectors = torch.linalg.eigh(_lower_gram(W))
    top, S = values[-1].clamp_min(0).sqrt(), values.flip(0)[part].clamp_min(0).sqrt()
    if not bool(S[-1] > 1e-6 * top):
        return None
    V = vectors.flip(1)[:, part]
    U, Vh = signed((W @ V) / S, V.T)
    return Basis(U.float(), S.float(), Vh.float())


def _lower_gram(W: torch.Tensor, blocks: int = 4) -> torch.Tensor:
    """WᵀW (n, n) for W (m, n), its upper blocks left at zero: eigh reads the lower triangle alone."""
    n = W.shape[1]
    made = W.new_zeros(n, n)
    edges = [n * i // blocks for i in range(blocks + 1)]
    for low, high in itertools.pairwise(edges):
        made[low:high, :high] = W[:, low:high].T @ W[:, :high]
    return made


def leading(weight: torch.Tensor, r: int, rounds: int = 2, degree: int = 4) -> Basis | None:
    """The r largest triplets by Chebyshev-filtered subspace iteration: for r far below min(m, n), several times faster.

    A block of 2r + 32 vectors is multiplied by polynomials of WᵀW that are small on the spectrum's lower end, in single
    precision; the triplets are then taken from the block in double precision. None unless every residual
    ‖Wᵀu − σv‖ is below 10⁻⁶·σ₁, which is what single precision can tell.
    """
    m, n = weight.shape
    if m < n:
        flipped = leading(weight.T.contiguous(), r, rounds, degree)
        if flipped is None:
            return None
        U, Vh = signed(flipped.Vh.T.contiguous(), flipped.U.T.contiguous())
        return Basis(U, flipped.S, Vh)
    W = weight.float()
    gram = W.T @ W
    block = torch.randn(n, 2 * r + 32, generator=torch.Generator().manual_seed(0)).to(W.device)
    Q = torch.linalg.qr(gram @ (gram @ block))[0]
    for _ in range(rounds):
        edge = torch.linalg.eigvalsh(Q.T @ (gram @ Q))[0].clamp_min(1e-30)  # about the block's smallest σ²
        before, now = Q, (gram @ Q) * (2 / edge) - Q  # Chebyshev T₀ and T₁ on [0, edge] mapped to [-1, 1]
        for _ in range(degree - 1):
            before, now = now, 2 * ((gram @ now) * (2 / edge) - now) - before
            scale = now.abs().amax()
            before, now = before / scale, now / scale
        Q = torch.linalg.qr(now)[0]
    Z, Q = W.double() @ Q.double(), Q.double()
    values, vectors = torch.linalg.eigh(Z.T @ Z)
    S = values.flip(0)[:r].clamp_min(1e-300).sqrt()
    V = Q @ vectors.flip(1)[:, :r]
    U = (Z @ vectors.flip(1)[:, :r]) / S
    residual = (W.double().T @ U - V * S).norm(dim=0).amax() / S[0]
    if not bool(residual < 1e-6):
        return None
    U, Vh = signed(U, V.T)
    return Basis(U.float(), S.float(), Vh.float().contiguous())


def factorise(weight: torch.Tensor, part: slice = ALL) -> Basis:
    """The singular triplets in `part`, of all in descending order, of a finite (m, n) matrix: the Gram way where it is
    safe."""
    found = by_gram(weight, part)
    if found is None:
        full = exact(weight)
        found = Basis(full.U[:, part], full.S[part], full.Vh[part])
    return Basis(*(_own(x) for x in found))


def _own(x: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: rows cut from a larger matrix would keep all of it."""
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.clone() if x.is_contiguous() and not whole else x.contiguous()


def cut(weight: torch.Tensor, r: int, smallest: bool = False) -> Basis:
    """The r largest (or smallest, still in descending order) triplets, by the fastest way that is exact."""
    size = min(weight.shape)
    if not smallest and size >= 256 and r <= size // 8 and (found := leading(weight, r)) is not None:
        return found
    return factorise(weight, slice(size - r, None) if smallest else slice(0, r))


_folder: Path | None = None


@contextlib.contextmanager
def cached_in(folder: Path) -> Generator[None]:
    """Keep the cache in another folder for a while."""
    global _folder
    before, _folder = _folder, folder
    try:
        yield
    finally:
        _folder = before


def cache_folder() -> Path:
    """LAB_HOME/cache, or the platform's cache folder."""
    if _folder:
        return _folder
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
    made = cut(weight, r, smallest)
    if cache:
        _write(path, made)
    return made


def bases(
    weights: Sequence[torch.Tensor | Callable[[], torch.Tensor]], ranks: Sequence[int], **options: bool
) -> list[Basis]:
    """`basis` of many weights, as many at once as torch has threads. A weight may be given as a function that makes
    it, so that no more of them are there at once.

    A factorisation gains little from a second thread, two of them gain all: each is done by one thread, so that the
    numbers do not depend on how many there are.
    """

    def one(weight: torch.Tensor | Callable[[], torch.Tensor], r: int) -> Basis:
        return basis(_made(weight), r, **options)

    threads = torch.get_num_threads()
    if threads == 1 or not weights or _made(weights[0]).device.type != "cpu":
        return _counted(map(one, weights, ranks), len(ranks))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                return _counted(pool.map(one, weights, ranks), len(ranks))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is under way is finished, the rest is not begun
                raise
    finally:
        torch.set_num_threads(threads)


def _made(weight: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight()


_tell: Callable[[int, int], None] | None = None


@contextlib.contextmanager
def telling(tell: Callable[[int, int], None]) -> Generator[None]:
    """Call `tell(done, all)` after each of the factorisations that `bases` makes meanwhile: a whole model's take
    minutes. It may raise, which stops them."""
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


def _counted(found: Iterable[Basis], count: int) -> list[Basis]:
    made = []
    for basis in found:
        made.append(basis)
        if _tell is not None:
            _tell(len(made), count)
    return made


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
