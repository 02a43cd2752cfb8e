"""Combinations Σᵢ cᵢ·vᵢ of pseudo-random basis vectors that are never kept: generated in chunks, or a fast transform.

`combine` is what NOLA and PRANC are made of. It is linear in the coefficients; its backward pass makes the basis
again, so that memory holds neither the basis nor anything of its size.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from lab import counter

CHUNK = 1 << 20  # basis entries generated at once: about 10 MB with the work space
T = TypeVar("T")
_H = 128  # the transform is made of products with Hadamard matrices of at most this side


def combine(coefficients: torch.Tensor, basis: str, key: int, size: int, cache_bytes: int = 0) -> torch.Tensor:
    """Σᵢ cᵢ·vᵢ (size,) for coefficients (k,), with entries of every vᵢ of variance 1/(3k).

    `uniform`: independent U(-1, 1)/√k, the paper's. `hadamard`: random rows of a Walsh–Hadamard matrix with its
    columns' signs drawn at random, entries ±1/√(3k): orthogonal when `size` is a power of two, nearly so otherwise.
    `cache_bytes` bounds what all bases together may keep between calls: uniform ones a byte an entry, Hadamard ones a
    byte an entry of the result and eight a coefficient.
    """
    return _Combine.apply(coefficients.float(), basis, key, size, cache_bytes)  # type: ignore[no-any-return]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, basis: str, key: int, size: int, cache_bytes: int) -> torch.Tensor:
        ctx.made_with = (basis, key, size, c.numel(), cache_bytes)
        return (_hadamard if basis == "hadamard" else _uniform)(c, key, size, cache_bytes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        basis, key, size, k, cache_bytes = ctx.made_with
        transposed = _hadamard_transposed if basis == "hadamard" else _uniform_transposed
        return transposed(grads[0].float(), key, size, k, cache_bytes), None, None, None, None


class Pair(NamedTuple):
    """The linear map of two coefficient vectors (k,), (l,) to two combinations, and its transpose. Neither keeps a graph."""

    forward: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def pair(
    counts: tuple[int, int],
    basis: str,
    keys: tuple[int, int],
    sizes: tuple[int, int],
    device: torch.device,
    cache_bytes: int = 0,
    gain: float = 1.0,
) -> Pair:
    """`combine` for two coefficient vectors, the second times `gain`; one transform does for two Hadamard bases of the
    same side, one reading for two small uniform ones."""
    if basis == "hadamard" and (side := _side(sizes[0])) != _side(sizes[1]):
        pass
    elif basis == "hadamard":
        bytes_, name = 2 * side + 12 * sum(counts), ("pair", keys, counts, sizes, gain, device)
        held = cache.get(name, bytes_, cache_bytes, lambda: _Constants.make(keys, counts, sizes, gain, device))
        if held is not None:
            return Pair(held.forward, held.backward)
    elif counts[0] * sizes[0] + counts[1] * sizes[1] <= CHUNK:
        twins = _twins(keys, counts, sizes, gain, device, cache_bytes)
        return Pair(twins.forward, twins.backward)
    to, back = (_hadamard, _hadamard_transposed) if basis == "hadamard" else (_uniform, _uniform_transposed)

    def forward(c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = to(c, keys[0], sizes[0], cache_bytes), to(d, keys[1], sizes[1], cache_bytes)
        return first, second if gain == 1 else second * gain

    def backward(g: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (back(x, *of, cache_bytes) for x, *of in zip((g, h), keys, sizes, counts, strict=True))
        return first, second if gain == 1 else second * gain

    return Pair(forward, backward)


class _Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: torch.Tensor, d: torch.Tensor, maps: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.maps = maps
        return maps.forward(c, d)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *ctx.maps.backward(grads[0], grads[1]), None


def combine_pair(c: torch.Tensor, d: torch.Tensor, maps: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """What `maps` makes of two coefficient vectors, with gradients."""
    return _Two.apply(c.float(), d.float(), maps)  # type: ignore[no-any-return]


class _Constants(NamedTuple):
    """Of two Hadamard bases side by side in one vector of 2N: rows (k + l,), signs (2, N) int8, factors (k + l,)."""

    rows: torch.Tensor
    signs: torch.Tensor
    scale: torch.Tensor
    counts: tuple[int, int]
    sizes: tuple[int, int]

    @classmethod
    def make(
        cls, keys: tuple[int, int], counts: tuple[int, int], sizes: tuple[int, int], gain: float, device: torch.device
    ) -> _Constants:
        side = _side(sizes[0])
        rows = [_rows(key, k, side, device, 0) + i * side for i, (key, k) in enumerate(zip(keys, counts, strict=True))]
        signs = torch.zeros(2, side, dtype=torch.int8, device=device)
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            signs[i, :size] = _signs(key, size, device, 0)
        scale = [torch.full((k,), (3 * k) ** -0.5 * g, device=device) for k, g in zip(counts, (1.0, gain), strict=True)]
        return cls(torch.cat(rows), signs, torch.cat(scale), counts, sizes)

    def forward(self, c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signs, sizes = self.signs, self.sizes
        spread = c.new_zeros(signs.numel()).index_copy_(0, self.rows, torch.cat((c, d)).mul_(self.scale))
        mixed = transform(spread, signs.shape[1]).view(signs.shape).mul_(signs)
        return mixed[0, : sizes[0]], mixed[1, : sizes[1]]

    def backward(self, g: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signs, sizes, k = self.signs, self.sizes, self.counts[0]
        spread = g.new_zeros(signs.shape)
        for i, grad in enumerate((g, h)):
            torch.mul(grad, signs[i, : sizes[i]], out=spread[i, : sizes[i]])
        both = transform(spread.view(-1), signs.shape[1]).index_select(0, self.rows) * self.scale
        return both[:k], both[k:]


def vectors(basis: str, k: int, key: int, size: int) -> torch.Tensor:
    """The basis itself (k, size): for tests and small cases."""
    return torch.stack([combine(row, basis, key, size) for row in torch.eye(k)])


# -- uniform ----------------------------------------------------------------------------------------------------
# With b the signed bytes of the generator, vᵢ = (bᵢ + ½)/(128·√k): products are taken with b alone.


def _uniform(c: torch.Tensor, key: int, size: int, cache_bytes: int) -> torch.Tensor:
    scaled = c * _step(c.numel())
    total = scaled.sum().mul_(0.5).repeat(size)
    for rows, columns, block in _chunks(key, c.numel(), size, c.device, cache_bytes):
        total[columns].addmv_(block.T, scaled[rows])
    return total


def _uniform_transposed(g: torch.Tensor, key: int, size: int, k: int, cache_bytes: int) -> torch.Tensor:
    total = g.sum().mul_(0.5).repeat(k)
    for rows, columns, block in _chunks(key, k, size, g.device, cache_bytes):
        total[rows].addmv_(block, g[columns])
    return total.mul_(_step(k))


def _step(k: int) -> float:
    """Distance of two neighbouring values of a uniform basis of k vectors."""
    return 1 / (128 * k**0.5)


def _chunks(
    key: int, k: int, size: int, device: torch.device, cache_bytes: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, bytes as float32) over the whole basis, at most CHUNK entries at once."""
    kept = cache.get(("uniform", key, k, size, device), k * size, cache_bytes, lambda: _bytes(key, k, size, device))
    wide = min(size, CHUNK // 4 * 4)
    high = max(1, CHUNK // wide)
    for left in range(0, size, wide):
        columns = range(left, min(left + wide, size))
        for top in range(0, k, high):
            rows = range(top, min(top + high, k))
            part = slice(rows.start, rows.stop), slice(columns.start, columns.stop)

            def block(rows: range = rows, columns: range = columns, part: Any = part) -> torch.Tensor:
                return counter.uniform_bytes(key, rows, columns, device) if kept is None else kept[part]

            yield *part, scratch.floats((key, rows, columns), (len(rows), len(columns)), device, block)


def _bytes(key: int, k: int, size: int, device: torch.device) -> torch.Tensor:
    """A whole basis (k, size), int8, made a chunk at a time."""
    made = torch.empty(k, size, dtype=torch.int8, device=device)
    high = max(1, CHUNK // size)
    for top in range(0, k, high):
        rows = range(top, min(top + high, k))
        made[rows.start : rows.stop] = counter.uniform_bytes(key, rows, range(size), device)
    return made


class _Twins:
    """Two small uniform bases one after the other, made into floats together; the second's combinations times a gain."""

    def __init__(
        self,
        keys: tuple[int, int],
        counts: tuple[int, int],
        sizes: tuple[int, int],
        gain: float,
        device: torch.device,
        cache_bytes: int,
    ) -> None:
        self.bases = tuple(zip(keys, counts, sizes, strict=True))
        self.name = ("twins", keys, counts, sizes, device)
        self.steps = _step(counts[0]), _step(counts[1]) * gain
        self.device, self.cache_bytes = device, cache_bytes
        self.first = counts[0] * sizes[0]
        self.length = self.first + counts[1] * sizes[1]

    def floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        (_, k, m), (_, l, n) = self.bases
        both = scratch.floats(self.name, (self.length,), self.device, self.kept)
        return both[: self.first].view(k, m), both[self.first :].view(l, n)

    def kept(self) -> torch.Tensor:
        found = cache.get(self.name, self.length, self.cache_bytes, self.made)
        return self.made() if found is None else found

    def made(self) -> torch.Tensor:
        return torch.cat([_bytes(*basis, self.device).view(-1) for basis in self.bases])

    def forward(self, c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (V, W), c, d = self.floats(), c * self.steps[0], d * self.steps[1]
        return torch.addmv(c.sum(), V.T, c, beta=0.5), torch.addmv(d.sum(), W.T, d, beta=0.5)

    def backward(self, g: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (V, W), (one, other) = self.floats(), self.steps
        to_c, to_d = torch.addmv(g.sum(), V, g, beta=0.5), torch.addmv(h.sum(), W, h, beta=0.5)
        return to_c.mul_(one), to_d.mul_(other)


_twins = functools.lru_cache(maxsize=4096)(_Twins)


class _Scratch(threading.local):
    """Room for a chunk's bytes as float32, one for each thread: memory made anew costs more than what is done with it.

    It remembers what it holds, since layers that share a basis often follow each other.
    """

    room: torch.Tensor | None = None
    holds: tuple[Any, ...] = ()

    def floats(
        self, name: tuple[Any, ...], shape: tuple[int, ...], device: torch.device, block: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What `block` makes, as float32, until the next call. The name says all that it depends on."""
        size = math.prod(shape)
        if device.type != "cpu" or size > CHUNK:
            return block().float()
        if self.room is None or self.room.numel() < size:
            with torch.inference_mode(False):  # what is made in that mode could not be written outside it
                self.room, self.holds = torch.empty(size), ()
        room = self.room[:size].view(shape)
        if self.holds != name:
            self.holds = ()  # nothing, should the next line fail
            room.copy_(block())
            self.holds = name
        return room


scratch = _Scratch()


class Cache:
    """What is made from keys alone and costs time to make, up to a stated number of bytes over all of it.

    A full cache takes nothing more in: layers come round in the same order at every step, and a cache that threw out
    the oldest would never hit. What was not used for a minute gives way.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], tuple[Any, int, float]] = {}  # name → what, its bytes, when it was used
        self.bytes = 0

    def get(self, name: tuple[Any, ...], size: int, limit: int, make: Callable[[], T]) -> T | None:
        """What has this name, made if it is missing and its `size` in bytes fits; None if it does not fit."""
        found = self.kept.get(name)
        if found is None:
            if self.bytes + size > limit and size <= limit:
                self._drop_unused()
            if self.bytes + size > limit:
                return None
            found = (make(), size, 0.0)
            self.bytes += size
        self.kept[name] = (found[0], found[1], time.monotonic())
        return found[0]

    def _drop_unused(self) -> None:
        now = time.monotonic()
        self.kept = {n: entry for n, entry in self.kept.items() if now - entry[2] < 60}
        self.bytes = sum(size for _, size, _ in self.kept.values())


cache = Cache()


def start_factor(key: int, rows: int, columns: int, device: torch.device, cache_bytes: int) -> torch.Tensor:
    """NOLA's frozen A₀ (rows, columns), uniform in ±1/√columns."""

    def make() -> torch.Tensor:
        return (counter.uniform(key, range(1), range(rows * columns), device) * columns**-0.5).view(rows, columns)

    kept = cache.get(("start", key, rows, columns, device), 4 * rows * columns, cache_bytes, make)
    return make() if kept is None else kept


# -- Hadamard ---------------------------------------------------------------------------------------------------
# vᵢ[p] = σₚ·H[rowᵢ, p]/√(3k), H the ±1 Walsh–Hadamard matrix of side N = 2ᵃ ≥ size. Over the first `size` columns the
# product of rows i and j is at most 2ᵗ, t the lowest bit in which they differ: so rows differ in their lowest bits,
# which hold i, and are random in the others. That bounds every cosine by k/size, and makes it 0 where size = N.


def _hadamard(c: torch.Tensor, key: int, size: int, cache_bytes: int) -> torch.Tensor:
    side, k = _side(size), c.numel()
    spread = c.new_zeros(side).index_copy_(0, _rows(key, k, side, c.device, cache_bytes), c * (3 * k) ** -0.5)
    return transform(spread)[:size] * _signs(key, size, c.device, cache_bytes)


def _hadamard_transposed(g: torch.Tensor, key: int, size: int, k: int, cache_bytes: int) -> torch.Tensor:
    side = _side(size)
    spread = g * _signs(key, size, g.device, cache_bytes)
    spread = spread if size == side else torch.nn.functional.pad(spread, (0, side - size))
    return transform(spread)[_rows(key, k, side, g.device, cache_bytes)] * (3 * k) ** -0.5


def _side(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _rows(key: int, k: int, side: int, device: torch.device, cache_bytes: int) -> torch.Tensor:
    """k different rows of the matrix: i in the low bits, random high bits."""

    def make() -> torch.Tensor:
        low = _side(k)
        high = counter.words(key, range(1, 2), range(k), device)[0].bitwise_and_(side // low - 1)
        return torch.arange(k, device=device) + low * high.long()

    kept = cache.get(("rows", key, k, side, device), 8 * k, cache_bytes, make)
    return make() if kept is None else kept


def _signs(key: int, size: int, device: torch.device, cache_bytes: int) -> torch.Tensor:
    """Random signs ±1 (size,) as int8: the sign bits of the generator's bytes."""

    def make() -> torch.Tensor:
        bits = counter.uniform_bytes(key, range(1), range(size), device)[0].bitwise_right_shift_(7)  # -1 or 0
        return bits.mul_(2).add_(1)

    kept = cache.get(("signs", key, size, device), size, cache_bytes, make)
    return make() if kept is None else kept


def transform(x: torch.Tensor, size: int = 0) -> torch.Tensor:
    """H·x for x (N,), N a power of two, H with entries ±1 in the natural (Sylvester) order; with `size`, of each
    stretch of that many entries.

    H is the Kronecker product of small Hadamard matrices, one for each axis of x reshaped; so a few matrix products
    of side at most 128 instead of log₂N passes over x.
    """
    size, whole = size or x.numel(), x.numel()
    done = 1  # length of the axes already transformed, at the right
    for side in _sides(size):
        h = _matrix(side, x.device, x.dtype)
        if done == 1:
            x = x.view(-1, side) @ h
        elif side * done == whole:
            x = h @ x.view(side, done)
        else:
            x = torch.bmm(h.expand(whole // (side * done), side, side), x.view(-1, side, done))
        done *= side
    return x.reshape(whole)


@functools.lru_cache(maxsize=64)
def _sides(size: int) -> tuple[int, ...]:
    """As few powers of two as give `size`, none above _H, and as equal as can be: their sum is the work an entry."""
    bits = size.bit_length() - 1
    parts = max(1, -(-bits // (_H.bit_length() - 1)))
    return tuple(1 << (bits // parts + (i < bits % parts)) for i in range(parts))


@functools.lru_cache(maxsize=32)
def _matrix(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=dtype, device=device)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype, device=device)
    while h.shape[0] < side:
        h = torch.kron(two, h)
    return h
