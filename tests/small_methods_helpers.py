"""A small network, a small method on it, and slow arithmetic to hold its update against."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lab.methods import METHODS
from lab.methods.spec import Layer

M, N = 6, 8  # out, in
LAYER = Layer("q", M, N, None, "q")


@pytest.fixture(autouse=True)
def small_methods_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path_factory.getbasetemp() / "lab"))


class Net(nn.Module):
    """Two linear layers of one shape and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.conv = nn.Linear(N, M, bias=False), nn.Linear(N, M, bias=False), nn.Conv2d(2, 4, (3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x)


def net(weight=None) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net().requires_grad_(False)
    if weight is not None:
        made.q.weight.data = torch.as_tensor(weight, dtype=torch.float32)
    return made


def site(id, model=None, targets=("q",), calibrate=None, shake=True, **knobs):
    """(model with the adapter, the first target's layer, its tensors), the trained ones moved off their start."""
    method = METHODS[id]
    model = net() if model is None else model
    made = method.attach(model, method.knobs(**knobs), list(targets), seed=4, calibrate=calibrate)
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad and shake:
                p.add_(torch.randn(p.shape, generator=noise) * 0.3)
    first = next(s for _, s, _ in method.sites(made))
    return made, first, {name: t.detach().clone() for name, t in first.tensors("default").items()}


def array(x):
    return np.asarray(torch.as_tensor(x).detach(), dtype=np.float64)


def product(*matrices):
    """A product of matrices by its definition."""
    total = array(matrices[0])
    for other in map(array, matrices[1:]):
        rows, inner, columns = total.shape[0], total.shape[1], other.shape[1]
        grown = np.zeros((rows, columns))
        for i, j in itertools.product(range(rows), range(columns)):
            grown[i, j] = sum(total[i, k] * other[k, j] for k in range(inner))
        total = grown
    return total


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(array(actual), array(expected), rtol=tolerance, atol=tolerance)
