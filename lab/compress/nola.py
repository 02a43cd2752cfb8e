"""NOLA: ΔW = (c/r)·B(β)·A(α) with A affine in α and B linear in β: least squares in each for the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab.compress import Fit, Plan, register, within
from lab.errors import LabError

if TYPE_CHECKING:
    import torch

    from lab.compress._least_squares import Affine
    from lab.compress._update import Goal, Matrix

RANKS = (1, 2, 4, 8, 16, 32)  # tried within a budget: r costs no parameters
PROBED = 4  # layers, those of the largest updates, on which the ranks are compared
ROUNDS, STEPS = 60, 12  # of alternation, and of conjugate gradients in each half, which begin where the last ones ended
FIRST = 2  # rounds before Newton's steps, which from far off may leave the valley that they start in
DIRECT = 1 << 27  # coefficients squared times entries, of a half, up to which the bases are written out
SETTLED = 5e-4  # the alternation ends when a round takes off less than this share of the squared error
SETTLED_NEWTON = 5e-4  # and the descent when a step takes off less than this share of the error


class NolaFit(Fit):
    """With α fixed, β is a linear least-squares problem, and the other way round. Small layers are fitted by Newton's
    method on what is left when β is at its best (`lab.coverage.bilinear`); large ones by alternation, each half solved on
    r columns instead of n: with Aᵀ = QR, ‖B·A − ΔW‖ and ‖B·Rᵀ − ΔW·Q‖ differ by a constant.

    It starts at the α whose A lies nearest to the r leading right singular vectors of ΔW, i.e. of smallest
    ‖(A₀ + A(α))(I − VVᵀ)‖: linear too, and exact when ΔW is an update of this very NOLA. Neither way ever increases
    the error; both end near a minimum, which need not be the least.
    """

    id, order = "nola", 3
    how = "least squares in α and β, linear in each: Newton's method, large layers by turns"

    def knobs(self, given: Mapping[str, Any]) -> Any:
        knobs = super().knobs(given)
        if knobs.quant_bits and knobs.quant == "qat":
            raise LabError(
                "NOLA with quant=qat is trained through its quantiser: take quant=ptq, which rounds afterwards."
            )
        return knobs

    def plan(self, goals: Sequence[Goal], budget: int | None, given: Mapping[str, Any]) -> Plan:
        knobs, layers = self.knobs(given), [goal.layer for goal in goals]
        if budget is None or "r" in given:
            return within(self.method, layers, budget, knobs, given)
        plans, problem = [], None
        for r in RANKS:
            try:
                plans.append(within(self.method, layers, budget, replace(knobs, r=r), given))
            except LabError as error:  # a rank above a layer's size, or fewer entries than coefficients
                problem = problem or error
        if not plans:
            assert problem is not None
            raise problem
        strongest = sorted(goals, key=lambda goal: -goal.matrix().square())[:PROBED]
        return min(plans, key=lambda plan: sum(self._alternate(goal, plan.knobs)[0] for goal in strongest))

    def solve(self, goal: Goal, t: Mapping[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        from lab.compress._update import rounded

        _, alpha, beta = self._alternate(goal, knobs)
        return dict(zip(("alpha", "beta"), rounded(alpha, beta), strict=True))

    def _alternate(self, goal: Goal, knobs: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
        """(squared error, α, β)."""
        from lab.compress._least_squares import own_cache
        from lab.compress._update import Matrix

        method: Any = self.method
        X, shape = goal.matrix(), method.shape(goal.layer)
        if shape != (goal.layer.m, goal.layer.n):  # a convolution, in its own near-square shape
            X = Matrix(X.full().reshape(shape))
        with own_cache(knobs) as roomy:
            problem = _Problem(method, goal.layer, roomy, X)
            return problem.descend(problem.aligned())


class _Problem:
    """One layer's two halves, through the method's own code: its bases written out where they are small, in double
    precision; else products with them, and conjugate gradients."""

    def __init__(self, method: Any, layer: Any, knobs: Any, X: Matrix) -> None:
        import torch

        from lab.compress._least_squares import Affine

        self.X, self.whole, self.r = X, X.square(), knobs.r
        zeros = {"alpha": torch.zeros(knobs.k), "beta": torch.zeros(knobs.l)}

        def part(name: str, which: int) -> Affine:
            return Affine(lambda x: method.combined({**zeros, name: x}, knobs, layer)[which], zeros[name].numel())

        self.A, self.B = part("alpha", 1), part("beta", 0)
        self.direct = max(f.size**2 * f.constant.numel() for f in (self.A, self.B)) <= DIRECT
        if self.direct:
            _, _, maps, A0 = method.parts(zeros, knobs, layer)
            A, B = _rows(maps, knobs.k, knobs.l)
            self.A = Affine.of_rows(A0, A.view(knobs.k, *self.A.constant.shape))
            self.B = Affine.of_rows(self.B.constant, B.view(knobs.l, *self.B.constant.shape))

    def aligned(self) -> torch.Tensor:
        """α with the rows of A nearest to the span of the r leading right singular vectors."""
        Q = self.X.svd()[2][: self.r].T.to(self.A.constant.dtype)

        def outside(A: torch.Tensor) -> torch.Tensor:  # a projection: its own transpose
            return A - (A @ Q) @ Q.T

        return self._least(self.A, outside, outside, Q.new_zeros(()), None, passes=3)

    def descend(self, alpha: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        beta, last, error = None, float("inf"), self.whole
        for _ in range(FIRST if self.direct else ROUNDS):
            beta = self._beta(alpha, beta)
            alpha, error = self._alpha(alpha, beta)
            if not error < (1 - SETTLED) * last or error <= 1e-13 * self.whole:
                break
            last = error
        assert beta is not None
        return self._newton(alpha) if self.direct else (error, alpha, beta)

    def _newton(self, alpha: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        import torch

        from lab.coverage import bilinear
        from lab.coverage.pairs import NolaPair

        scale = self.whole**0.5
        pair = NolaPair(self.A.rows.numpy(), self.B.rows.numpy(), self.A.constant.numpy())
        goal = (self.X.full() / scale).numpy()
        found = bilinear.descend(pair, goal, alpha.double().numpy(), ROUNDS, SETTLED_NEWTON)
        return self.whole * found.norm**2, torch.from_numpy(found.x), torch.from_numpy(found.y * scale)

    def _least(
        self, f: Affine, forward: Any, backward: Any, goal: torch.Tensor, start: torch.Tensor | None, passes: int = 1
    ) -> torch.Tensor:
        """x of smallest ‖forward(f(x)) − goal‖."""
        from lab.compress._least_squares import solve, solve_directly

        if self.direct:
            return solve_directly(f, forward, goal)
        return solve(f.then(forward, backward), goal.float(), start, steps=STEPS * passes, passes=passes)

    def _beta(self, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """argmin ‖B(β)·Rᵀ − X·Q‖ with (A₀ + A(α))ᵀ = Q·R."""
        import torch

        Q, R = torch.linalg.qr(self.A(alpha).double().T)
        r = R.to(self.B.constant.dtype)
        return self._least(self.B, lambda B: B @ r.T, lambda G: G @ r, self.X.times(Q), beta)

    def _alpha(self, alpha: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(argmin ‖R·(A₀ + A(α)) − QᵀX‖ with B(β) = Q·R, the whole squared error there)."""
        import torch

        Q, R = torch.linalg.qr(self.B(beta).double())
        r, inside = R.to(self.A.constant.dtype), self.X.transposed_times(Q).T
        alpha = self._least(self.A, lambda A: r @ A, lambda G: r.T @ G, inside, alpha)
        made = R @ self.A(alpha).double()
        lost = max(0.0, self.whole - float(inside.square().sum()))
        return alpha, float((made - inside).square().sum()) + lost


def _rows(maps: Any, k: int, l: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both bases, (k, r·n) and (l, m·r), a vector of each at a time."""
    import torch

    both = []
    for i in range(max(k, l)):
        c, d = torch.zeros(k), torch.zeros(l)
        c[i : i + 1], d[i : i + 1] = 1, 1
        both.append(maps.forward(c, d))
    return torch.stack([a.flatten() for a, _ in both[:k]]), torch.stack([b.flatten() for _, b in both[:l]])


register(NolaFit())
