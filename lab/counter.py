"""Counter-based random numbers: a function of (key, stream, position), in exact 32-bit integer arithmetic.

The same on every device, library version and chunking, which no library generator promises. The mixer is the
two-multiply xorshift hash of the hash-prospector search (github.com/skeeto/hash-prospector, 0x21f0aaad/0x735a2d97),
applied to the position, then to that xor the stream's own word: streams are not shifted copies of each other.
int32 products wrap modulo 2³² on every backend of torch; a committed checksum guards that.
"""

from __future__ import annotations

import functools
import hashlib

import torch

_M1, _M2 = 0x21F0AAAD, 0x735A2D97
_MASK = 0xFFFFFFFF


@functools.lru_cache(maxsize=8192)
def key(*parts: object) -> int:
    """A 62-bit key from anything printable, e.g. (seed, layer name, "a"): the start of the SHA-256 of its text."""
    text = "\x1f".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 2


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _mix_(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """x ^= x>>16; x *= M1; x ^= x>>15; x *= M2; x ^= x>>15, in place; shifts are logical, hence the masks."""
    for shift, factor in ((16, _M1), (15, _M2), (15, None)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch.bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(scratch)
        if factor is not None:
            x.mul_(factor)
    return x


def words(key: int, streams: range, positions: range, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random 32-bit words (len(streams), len(positions)) as int32: word [i, j] depends on key, streams[i] and
    positions[j] alone. Positions and streams must stay under 2³¹."""
    low, high = _signed(key & _MASK), _signed((key >> 31) & _MASK)
    s = torch.arange(streams.start, streams.stop, dtype=torch.int32, device=device)
    p = torch.arange(positions.start, positions.stop, dtype=torch.int32, device=device)
    for word, axis in ((high, s), (low, p)):
        _mix_(axis.bitwise_xor_(word), torch.empty_like(axis))
    x = p[None, :] ^ _mix_(s.add_(low), torch.empty_like(s))[:, None]
    return _mix_(x, torch.empty_like(x))


def uniform_bytes(key: int, streams: range, positions: range, device: torch.device | str = "cpu") -> torch.Tensor:
    """Signed bytes b (len(streams), len(positions)), int8: (b + ½)/128 is uniform over 256 values in (-1, 1).

    Four a word, in little-endian order. `positions` must start at a multiple of four.
    """
    first, last = positions.start // 4, -(-positions.stop // 4)
    return words(key, streams, range(first, last), device).view(torch.int8)[:, : len(positions)]


def uniform(key: int, streams: range, positions: range, device: torch.device | str = "cpu") -> torch.Tensor:
    """The same as float32 in (-1, 1): every value is exact, mean 0, variance 1/3."""
    return (uniform_bytes(key, streams, positions, device).float() + 0.5) / 128


def signs(key: int, stream: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`count` random signs ±1 as float32."""
    bits = words(key, range(stream, stream + 1), range(count), device)[0]
    return (bits.bitwise_right_shift_(31) * 2 + 1).float()  # the top bit, shifted arithmetically, is -1 or 0
