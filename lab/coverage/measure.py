"""Dimensions by singular values, in double precision, with one stated tolerance and the spectrum behind every number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lab.coverage.maps import Array, UpdateMap, generator

TOLERANCE = (
    1e-6  # of the largest singular value; rounding leaves about 1e-8 through a Gram matrix, generic values > 1e-4
)
UPDATES = 4  # single updates of which the one of highest rank is taken
EXTRA = 8  # samples beyond the dimension that is expected: they must all fall into the span already found
CHUNK = 1 << 21  # numbers of updates held at once


@dataclass(frozen=True)
class Spectrum:
    """Singular values over the largest one, falling; those above the tolerance are counted."""

    values: Array
    samples: int  # rows of the matrix whose values these are
    certified: int = 0  # the rank where it was proved without the values, which are then empty

    @property
    def rank(self) -> int:
        return self.certified or int((self.values > TOLERANCE).sum())

    @property
    def kept(self) -> float:
        """The smallest value that counts; 0 when none does, the bound that was proved for a certified rank."""
        if self.certified:
            return 10 * TOLERANCE
        return float(self.values[self.rank - 1]) if self.rank else 0.0

    @property
    def dropped(self) -> float:
        """The largest value that does not count; 0 when all do."""
        return float(self.values[self.rank]) if self.rank < len(self.values) else 0.0

    @property
    def clear(self) -> bool:
        """Whether the tolerance lies in a gap: no value within a factor of ten of it."""
        return self.certified > 0 or ((not self.rank or self.kept > 10 * TOLERANCE) and self.dropped < TOLERANCE / 10)


def singular(matrix: Array) -> Array:
    """Singular values of (N, D) by a full decomposition: the reference."""
    return np.linalg.svd(matrix, compute_uv=False)


def by_gram(matrix: Array) -> Array:
    """The same from the eigenvalues of the smaller Gram matrix: many times faster, and blind below 1e-8 of the largest,
    because squaring costs half of the digits."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return np.sqrt(np.linalg.eigvalsh(gram)[::-1].clip(min=0))


def _unit(matrix: Array) -> Array:
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix[length[:, 0] > 0] / length[length[:, 0] > 0]


def fills(parts: Iterable[Array]) -> bool:
    """Whether the rows of all parts (N, D) span all D dimensions, with every singular value above ten times the tolerance.

    The Gram matrix less the square of that bound has a Cholesky factor if and only if no eigenvalue is below it
    (Sylvester): a tenth of the time of the eigenvalues, and the usual case at the right end of a curve. Holds the Gram
    matrix and one part at a time.
    """
    gram, many = np.zeros((0, 0)), 0
    for part in parts:
        rows = _unit(part)
        gram = rows.T @ rows if not many else np.add(gram, rows.T @ rows, out=gram)
        many += len(rows)
    if many < len(gram) or not many:
        return False
    x = np.ones(len(gram))
    for _ in range(12):  # the largest eigenvalue, from below, in the end doubled: a stricter bound is no wrong one
        x = gram @ (x / np.linalg.norm(x))
    gram[np.diag_indices(len(gram))] -= 2 * np.linalg.norm(x) * (10 * TOLERANCE) ** 2
    try:
        np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return False
    return True


def spectrum(matrix: Array, *, gram: bool = True) -> Spectrum:
    """Rows of other lengths count alike: they are scaled to one first, which changes no span."""
    rows = _unit(matrix)
    if not len(rows):
        return Spectrum(np.zeros(1), len(matrix))
    values = by_gram(rows) if gram else singular(rows)
    return Spectrum(values / values[0], len(matrix))


def span(
    update: UpdateMap, seed: int, expected: int | None = None, *, gram: bool = True, values: bool = True
) -> Spectrum:
    """Spectrum of random updates: its rank is the dimension of their span.

    Samples are drawn until there are more of them than dimensions: an eighth more than `expected` (a closed form) at
    first, and twice as many again while they all turn out to be independent. At most an eighth more than d², the whole
    space, so that a full span stays well conditioned. Without `values` a span that is expected to be everything is
    certified to be (`fills`), where it is, without its spectrum. A linear map's span is its Jacobian's.
    """
    if update.linear:
        return span_by_tangents(update, seed, update.size)
    whole = update.d**2
    rng = generator(seed, "samples", update.d, update.size)
    most = whole + max(EXTRA, whole // 8)
    want = min(most, (expected + max(EXTRA, expected // 8)) if expected else 4 * update.size + EXTRA)
    if not values and expected == whole and fills(_parts(update, rng, want)):
        return Spectrum(np.zeros(0), want, whole)
    rows = np.empty((0, whole))
    while True:
        rows = np.concatenate((rows, _drawn(update, rng, want - len(rows))))
        found = spectrum(rows, gram=gram)
        if len(rows) >= most or found.rank <= len(rows) - EXTRA:
            return found
        want = min(most, 2 * len(rows))


def _parts(update: UpdateMap, rng: np.random.Generator, count: int) -> Iterator[Array]:
    each = max(1, CHUNK // update.d**2)
    for done in range(0, count, each):
        yield update.delta(update.draw(rng, min(each, count - done)))


def _drawn(update: UpdateMap, rng: np.random.Generator, count: int) -> Array:
    return np.concatenate([*_parts(update, rng, count), np.empty((0, update.d**2))])


def span_by_tangents(update: UpdateMap, seed: int, expected: int) -> Spectrum:
    """The same span from Jacobians at random points, p updates' directions for each evaluation.

    For an analytic map the derivatives lie in the span of the image, being limits of differences of its members, and
    together with one member they span it: ΔW(θ) − ΔW(θ') is an integral of derivatives. So a few Jacobians and one
    sample replace many samples.
    """
    rng = generator(seed, "tangents", update.d, update.size)
    points = 1 if update.linear else math.ceil(1.5 * expected / update.size) + 1
    rows = [update.jacobian(update.draw(rng, 1)[0]) for _ in range(points)]
    return spectrum(np.concatenate([*rows, update.delta(update.draw(rng, 1))]))


def local(update: UpdateMap, seed: int) -> Spectrum:
    """Spectrum of the Jacobian at a random point: its rank is the local dimension."""
    rng = generator(seed, "point", update.d, update.size)
    values = by_gram(update.jacobian(update.draw(rng, 1)[0]))
    return Spectrum(values / (values[0] or 1.0), update.size)


def one(update: UpdateMap, seed: int) -> Spectrum:
    """Spectrum of one random update, as a matrix: of several, the one of highest rank, because the generic rank is the
    largest that occurs and a random update may come near a singular one."""
    rng = generator(seed, "update", update.d, update.size)
    updates = update.delta(update.draw(rng, UPDATES)).reshape(-1, update.d, update.d)
    spectra = [Spectrum(values / (values[0] or 1.0), 1) for values in map(singular, updates)]
    return max(spectra, key=lambda s: (s.rank, s.kept))
