"""ΔW as a function of the trained numbers through a method's own code: any row of the registry. Imports torch and PEFT.

The adapter is put on one linear layer. Rows of the lab's own go through their pure functions in double precision;
PEFT's through their layer: the answer to the identity matrix, less the base's, is the transposed update.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lab.coverage.maps import Array, UpdateMap, weight
from lab.errors import LabError
from lab.methods.own import OwnMethod
from lab.methods.spec import Method

NAME = "layer"
BATCH = 1024  # entries of ΔW that are differentiated at once, backwards
NUMBERS = 1 << 20  # of updates, or of a Jacobian forwards, that are computed at once
ROUNDING = 1e-6  # share of ΔW: what rounding in single precision leaves of linearity


@dataclass(frozen=True)
class CodeMap(UpdateMap):
    """`evaluate` gives ΔW (d, d) of a flat θ (p,), as a tensor; trained numbers are drawn about their start."""

    evaluate: Any = None
    origin: Array = field(default_factory=lambda: np.zeros(0))
    scale: Array = field(default_factory=lambda: np.zeros(0))

    def delta(self, theta: Array) -> Array:
        points = torch.from_numpy(np.ascontiguousarray(theta))
        with torch.no_grad():
            made = self._batched(points) if len(points) > 1 else self._each(points)
        made = made.numpy().astype(np.float64)
        # What is left of W − W is rounding, not an update (BitFit).
        return np.where(np.linalg.norm(made, axis=1, keepdims=True) > 1e-10, made, 0.0)

    def _flat(self, point: torch.Tensor) -> torch.Tensor:
        return self.evaluate(point).reshape(-1)

    def _each(self, points: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._flat(p) for p in points]) if len(points) else points.new_empty((0, self.d**2))

    def _batched(self, points: torch.Tensor) -> torch.Tensor:
        try:
            return torch.func.vmap(self._flat, chunk_size=max(1, NUMBERS // self.d**2))(points)
        except RuntimeError:  # an operation that cannot be batched, or draws random numbers
            return self._each(points)

    def jacobian(self, theta: Array) -> Array:
        """By automatic differentiation, many directions at once: forwards, or backwards where a method's code has
        something that only goes backwards."""
        point = torch.from_numpy(np.ascontiguousarray(theta))
        try:
            return self._forwards(point)
        except RuntimeError:  # PEFT's own autograd.Function
            return self._backwards(point.requires_grad_(True))

    def _forwards(self, point: torch.Tensor) -> Array:
        def pushed(direction: torch.Tensor) -> torch.Tensor:
            return torch.func.jvp(self._flat, (point,), (direction,))[1]

        push = torch.func.vmap(pushed, chunk_size=max(1, NUMBERS // self.d**2))
        return push(torch.eye(self.size, dtype=point.dtype)).double().numpy()

    def _backwards(self, point: torch.Tensor) -> Array:
        out = self._flat(point)
        if not out.requires_grad:
            return np.zeros((self.size, len(out)))
        whole = torch.eye(len(out), dtype=out.dtype)
        try:
            rows = [self._pulled(out, point, part) for part in whole.split(BATCH)]
        except RuntimeError:  # an operation that autograd cannot batch (einsum in PEFT's own Function, a sparse matrix)
            if self.linear:
                origin = np.zeros((1, self.size))
                return self.delta(np.eye(self.size)) - self.delta(origin)
            rows = [self._pulled(out, point, part[0])[None] for part in whole.split(1)]
        return torch.cat(rows).T.double().numpy()

    def _pulled(self, out: torch.Tensor, point: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """Directions (d²,) or (many, d²) of ΔW → of θ."""
        (found,) = torch.autograd.grad(
            out, point, directions, retain_graph=True, allow_unused=True, is_grads_batched=directions.ndim == 2
        )
        return found if found is not None else out.new_zeros((*directions.shape[:-1], self.size))

    def about(self, noise: Array) -> Array:
        """The start plus the noise, as large as each tensor's start; of size one where it starts at zero."""
        return self.origin + self.scale * noise


def code(method: Method, d: int, knobs: Any, seed: int) -> CodeMap:
    """The method's own map on a d×d layer.

    Raises LabError when the method adds no fixed matrix to the weight (it is no linear map of the input, or draws
    random numbers), or trains nothing.
    """
    model = nn.Sequential()
    linear = nn.Linear(d, d, bias=False)
    linear.weight.data = torch.from_numpy(weight(d, seed)).float()
    model.add_module(NAME, linear)
    base = linear.weight.detach().double().clone()

    def calibrate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (model(torch.randn(4 * d, d, generator=generator)) ** 2).mean()

    peft = method.attach(model, knobs, [NAME], seed=seed, calibrate=calibrate)
    peft.eval()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    if not trained:
        raise LabError(f"{method.name} trains nothing on this layer.")
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    start = [p.detach().double().flatten() for p in trained.values()]
    spread = [torch.full_like(s, float(s.pow(2).mean().sqrt()) or 1.0) for s in start]
    make = _pure if isinstance(method, OwnMethod) else _through_layer
    evaluate = make(method, peft, trained, base, knobs)
    made = CodeMap(
        d, shapes, lambda t: next(iter(t.values())), evaluate=evaluate,
        origin=torch.cat(start).numpy(), scale=torch.cat(spread).numpy(),
    )  # fmt: skip
    if not isinstance(method, OwnMethod):
        _check_fixed(method, peft, d)
    return replace(made, linear=_is_linear(made))


def _is_linear(update: CodeMap) -> bool:
    """Whether ΔW(a + b) + ΔW(0) = ΔW(a) + ΔW(b) at random a and b, to rounding."""
    a, b = update.draw(np.random.default_rng(0), 2)
    zero, of_a, of_b, both = update.delta(np.stack((0 * a, a, b, a + b)))
    return bool(np.linalg.norm(both + zero - of_a - of_b) <= ROUNDING * np.linalg.norm((of_a, of_b, zero)))


def _split(theta: torch.Tensor, shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    parts = theta.split([p.numel() for p in shapes.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(shapes.items(), parts, strict=True)}


def _pure(method: Any, peft: Any, trained: dict[str, nn.Parameter], base: torch.Tensor, knobs: Any) -> Any:
    _, site, adapter = next(iter(method.sites(peft)))
    own = site.tensors(adapter)
    names = {n: next(k for k, p in own.items() if p is parameter) for n, parameter in trained.items()}
    frozen = {k: v.detach().double() if v.is_floating_point() else v.detach() for k, v in own.items()}
    if method.uses_weight:
        frozen["weight"] = base
    settings, layer = site.knobs[adapter], site.layer

    def evaluate(theta: torch.Tensor) -> torch.Tensor:
        t = frozen | {names[n]: value for n, value in _split(theta, trained).items()}
        return method.delta(t, settings, layer).double()

    def single(theta: torch.Tensor) -> torch.Tensor:
        t = frozen | {names[n]: value for n, value in _split(theta, trained).items()}
        return method.delta({k: v.float() for k, v in t.items()}, settings, layer).double()

    try:
        evaluate(torch.zeros(sum(p.numel() for p in trained.values()), dtype=torch.float64))
    except RuntimeError:  # frozen tensors that its code makes in single precision: noise of 1e-7, below the tolerance
        return single
    return evaluate


def _through_layer(method: Any, peft: Any, trained: dict[str, nn.Parameter], base: torch.Tensor, knobs: Any) -> Any:
    peft.double()
    identity = torch.eye(base.shape[1], dtype=torch.float64)
    zero = torch.zeros(1, base.shape[1], dtype=torch.float64)

    def evaluate(theta: torch.Tensor) -> torch.Tensor:
        values = _split(theta, trained)
        out = torch.func.functional_call(peft, values, (torch.cat((identity, zero)),))
        return (out[:-1] - out[-1:]).T - base

    return evaluate


def _check_fixed(method: Method, peft: Any, d: int) -> None:
    """Raise LabError unless the adapted layer is one fixed affine map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, d, generator=generator, dtype=torch.float64)
    moved = {n: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in peft.named_parameters()}
    with torch.no_grad():
        origin, once, again, twice = (
            torch.func.functional_call(peft, moved, (y,)) for y in (torch.zeros_like(x), x, x, 2 * x)
        )
    near = 1e-5 * float(once.abs().max())
    if float((once - again).abs().max()) > near or float((twice - 2 * once + origin).abs().max()) > near:
        raise LabError(f"{method.name} is no fixed change of the weight: it has no span to measure.")
