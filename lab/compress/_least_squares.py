"""Linear least squares through a method's own code: products with the basis, never the basis itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator
from typing import Any

import torch

CACHE_MIB = 256  # for the bases of one layer
TOLERANCE = 1e-5  # what single precision reaches in one pass
NOISE = 1e-6  # a gradient of this share of what the residual could give is rounding: going on would amplify it

Map = Callable[[torch.Tensor], torch.Tensor]


class Affine:
    """x (size,) → f(x) = constant + linear(x), with the transpose of the linear part by a backward pass through one graph."""

    rows: torch.Tensor = torch.empty(0)  # of `of_rows` alone

    def __init__(self, f: Map, size: int) -> None:
        self.size = size
        x = torch.zeros(size, requires_grad=True)
        with torch.enable_grad():
            y = f(x)
        self.constant = y.detach()
        self._f = f
        self._back: Map = lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """f(x)."""
        with torch.no_grad():
            return self._f(x)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """The linear part, at a length of x at which the constant takes no digits from it."""
        length = float(x.norm()) or 1.0
        return (self(x / length) - self.constant) * length

    def transposed(self, g: torch.Tensor) -> torch.Tensor:
        return self._back(g)

    def then(self, forward: Map, backward: Map) -> Affine:
        """forward∘f, for a linear `forward` whose transpose is `backward`: the same graph serves."""
        made = object.__new__(Affine)
        made.size, made.constant = self.size, forward(self.constant)
        made._f = lambda x: forward(self(x))
        made._back = lambda g: self._back(backward(g))
        return made

    @classmethod
    def of_rows(cls, constant: torch.Tensor, rows: torch.Tensor) -> Affine:
        """constant + Σ xᵢ·rowsᵢ in double precision, the linear part (size, …) at hand: for small ones, of which many
        products are taken."""
        made = object.__new__(cls)
        made.size, made.constant, made.rows = len(rows), constant.double(), rows.double()
        made._f = lambda x: made.constant + torch.tensordot(x.double(), made.rows, 1)
        made._back = lambda g: made.rows.flatten(1) @ g.double().flatten()
        return made


def solve_directly(f: Affine, forward: Map, goal: torch.Tensor) -> torch.Tensor:
    """x of smallest ‖forward(f(x)) − goal‖ for a linear `forward` that takes leading axes; of smallest norm where there
    are many (complete orthogonal factorisation)."""
    left = (goal - forward(f.constant)).flatten()
    return torch.linalg.lstsq(forward(f.rows).flatten(1).T, left[:, None]).solution[:, 0]


def solve(
    f: Affine, goal: torch.Tensor, start: torch.Tensor | None = None, *, steps: int = 200, passes: int = 1
) -> torch.Tensor:
    """x of smallest ‖f(x) − goal‖, by conjugate gradients on the normal equations (CGLS, Björck 1996, algorithm 7.4.1).

    From `start`, or from zero, which gives the solution of smallest norm where there are many. A pass ends when its
    gradient has fallen to TOLERANCE of what it began with, or after `steps`; a further pass begins at the true
    residual, so that single precision is no limit (iterative refinement). An orthogonal basis needs one step.
    """
    x, gain = torch.zeros(f.size) if start is None else start, 0.0
    for _ in range(passes):
        left = goal - f.constant if not bool(x.any()) else goal - f(x)
        slope = f.transposed(left)
        if _square(slope) <= NOISE**2 * gain * _square(left):
            break
        correction, gain = _correction(f, left, slope, steps)
        x = x + correction
    return x


def _correction(f: Affine, left: torch.Tensor, slope: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
    """(d of smallest ‖linear(d) − left‖, a lower bound of the linear part's largest singular value's square).

    `slope` is what the transposed linear part makes of `left`.
    """
    d, direction = torch.zeros_like(slope), slope
    size, gain = _square(slope), 0.0
    small = TOLERANCE**2 * size
    for _ in range(steps if size else 0):
        image = f.linear(direction)
        stretch = _square(image)
        if stretch == 0:
            break
        gain = max(gain, stretch / _square(direction))
        d = d + direction * (size / stretch)
        left = left - image * (size / stretch)
        slope = f.transposed(left)
        before, size = size, _square(slope)
        if size <= max(small, NOISE**2 * gain * _square(left)):
            break
        direction = slope + direction * (size / before)
    return d, gain


def _square(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


@contextlib.contextmanager
def own_cache(knobs: Any) -> Generator[Any]:
    """The settings with room for one layer's bases, and an empty cache: layers come one after the other, many products
    each, and have it to themselves."""
    from lab.methods import _basis

    roomy = copy.copy(knobs)  # with its seed, which is no field
    roomy.cache_mib = CACHE_MIB
    before, _basis.cache = _basis.cache, _basis.Cache()
    try:
        yield roomy
    finally:
        _basis.cache = before
