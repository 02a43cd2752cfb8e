"""What every method must hold, as plain functions: the tests run them over the registry, and over the guide's example."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from lab.errors import LabError
from lab.methods import adapters
from lab.methods.deltas import deltas
from lab.methods.own import OwnMethod
from lab.methods.spec import Layer

LAYERS = [Layer("q", 48, 32, None, "q", True), Layer("k", 32, 48, None, "k", False)]
TARGETS = ["q", "k"]


class Small(nn.Module):
    """Two linear layers of different shapes, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k(torch.tanh(self.q(x)))


def base(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small().requires_grad_(False).eval()


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))


def goal() -> torch.Tensor:
    """What a second network, a little off the base in every way an adapter may move it, makes of the inputs."""
    other = base()
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3).add_(torch.randn(p.shape, generator=noise) * 0.1)
        return other(inputs())


def fitting(method, layers=LAYERS):
    """The method's default settings, whole numbers halved until they fit the small layers."""
    knobs = method.knobs()
    for _ in range(12):
        try:
            for layer in layers:
                method.check(layer, knobs)
        except LabError:
            halved = {
                f.name: max(1, getattr(knobs, f.name) // 2)
                for f in dataclasses.fields(knobs)
                if type(getattr(knobs, f.name)) is int and getattr(knobs, f.name) > 1
            }
            knobs = dataclasses.replace(knobs, **halved)
        else:
            return knobs
    raise AssertionError(f"no settings of {method.id} fit {layers}")


def attached(method, model=None, seed=0, targets=TARGETS, x=None):
    model = base() if model is None else model
    x = inputs() if x is None else x
    dtype = next(model.parameters()).dtype
    wanted = goal()

    def calibrate() -> torch.Tensor:
        out = model(x.to(dtype)).float()
        return (out - wanted).square().mean() if out.shape == wanted.shape else out.square().mean()

    return method.attach(model, fitting(method), targets, seed=seed, calibrate=calibrate)


def shaken(model):
    """Every trained tensor moved, so that nothing is zero by accident of the start."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=noise) * 0.03)
    return model


def train(method, model, steps=30, lr=1e-2, x=None):
    """Losses of a short regression, with every hook the trainer calls, and what came after the last step."""
    x, wanted = inputs() if x is None else x, goal()
    optimizer = method.optimizer(model, lr)
    losses = []
    for step in range(steps):
        method.before_step(model, step, steps)
        loss = (model(x) - wanted).square().mean()
        penalty = method.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step(model, step, steps)
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append((model(x) - wanted).square().mean().item())
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace(".base_layer", ""): p.detach().clone() for n, p in model.named_parameters()}


# -- the battery ----------------------------------------------------------------------------------------------------
def starts_at_the_base(method) -> None:
    x = inputs()
    before = base()(x)
    after = attached(method).eval()(x)
    if method.identity_start:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.isfinite(after).all()
        assert (after - before).abs().max() > 1e-6, "does not start at the base by accident only: promise it"


def merges_exactly(method) -> None:
    x = inputs()
    model = shaken(attached(method)).eval()
    before = {n: p for n, p in weights(model).items() if n.endswith(("q.weight", "k.weight"))}
    plain = model(x)
    if not method.mergeable:
        raise AssertionError("not mergeable: test refuses_to_merge")
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), plain, rtol=1e-3, atol=1e-4)
    for name, weight in weights(model).items():
        if name in before and isinstance(method, OwnMethod):
            assert torch.equal(weight, before[name]), f"{name} did not come back bit for bit"


def saves_and_loads(method, folder) -> None:
    x = inputs()
    model = attached(method, seed=5)
    train(method, model, steps=4)
    model.eval()
    model.save_pretrained(str(folder))
    loaded = adapters.load(base(), folder)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def gradients_reach(method) -> None:
    model = shaken(attached(method))
    for step in range(0, 100, 5):  # some methods train one part after another
        method.before_step(model, step, 100)
        (model(inputs()) - goal()).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} got no gradient"
            assert p.grad.abs().max() > 0, f"{name} got a zero gradient"
        else:
            assert p.grad is None, f"{name} is frozen and got a gradient"


def counts_right(method) -> None:
    model = attached(method)
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method.count(LAYERS, fitting(method)) == actual


def learns(method) -> None:
    """At one of two learning rates: the methods' natural scales differ by more than ten times."""
    tried = []
    for lr in (1e-2, 1e-1):
        losses = train(method, attached(method), lr=lr)
        tried.append(losses[-1] / losses[0])
        if tried[-1] < 0.99:
            return
    raise AssertionError(f"the loss fell to {min(tried):.3f} of its start")


def runs_in_bf16(method) -> None:
    model = shaken(attached(method, base().to(torch.bfloat16)))
    out = model(inputs().bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


def lives_on_a_half_precision_base(method, folder) -> None:
    """Attach, train, merge, unmerge, save and load on a float16 base: the adapter itself stays in float32."""

    def half() -> nn.Module:
        return base().to(torch.float16)

    x = inputs().half()
    model = attached(method, half(), seed=5)
    before = {n: p for n, p in weights(model).items() if n.endswith(("q.weight", "k.weight"))}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    start = [p.detach().clone() for p in trained]
    losses = train(method, model, steps=4, x=x)
    assert all(math.isfinite(loss) for loss in losses)
    assert any(not torch.equal(p, s) for p, s in zip(trained, start, strict=True))
    assert all(torch.isfinite(p).all() for p in trained)
    with torch.no_grad():
        out = model.eval()(x)
        assert out.dtype == torch.float16
        model.save_pretrained(str(folder))
        assert torch.equal(adapters.load(half(), folder).eval()(x), out)
        if method.mergeable:
            model.merge_adapter()
            torch.testing.assert_close(model(x), out, rtol=1e-2, atol=1e-2)
            model.unmerge_adapter()
            assert torch.equal(model(x), out)
    for name, weight in weights(model).items():
        if name in before:
            assert weight.dtype == torch.float16
            assert torch.equal(weight, before[name]), f"{name} did not come back bit for bit"


def has_the_rank_it_claims(method) -> None:
    model = shaken(attached(method)).eval()
    knobs = fitting(method)
    found = deltas(model)
    assert set(found) == set(TARGETS)
    for layer in LAYERS:
        dense = found[layer.name].dense()
        assert dense.shape == (layer.m, layer.n)
        rank = int(torch.linalg.matrix_rank(dense.double(), rtol=2e-4))
        assert rank <= method.rank(layer, knobs), f"rank {rank}, claimed at most {method.rank(layer, knobs)}"
        factors = found[layer.name].factors()
        if factors is not None:
            torch.testing.assert_close(factors[0] @ factors[1], dense, rtol=1e-4, atol=1e-6)
        if method.low_rank and method.id != "adalora":
            assert factors is not None, "low_rank rows give their factors"


def delta_is_what_it_adds(method) -> None:
    """W + ΔW in the base network makes the adapter's output (biases moved by the method apart)."""
    model = shaken(attached(method)).eval()
    other = base()
    with torch.no_grad():
        for name, delta in deltas(model).items():
            other.get_submodule(name).weight.add_(delta.dense())
        for name, module in model.base_model.model.named_modules():
            if name in TARGETS and other.get_submodule(name).bias is not None:
                module.merge()
                other.get_submodule(name).bias.copy_(module.get_base_layer().bias)
                module.unmerge()
    torch.testing.assert_close(other(inputs()), model(inputs()), rtol=1e-3, atol=2e-4)


def is_seeded(method) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first, second = (attached(method, seed=11) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "attaching moved the global generator"
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs between two starts with the same seed"


def unloads_clean(method) -> None:
    model = base()
    before = weights(model)
    made = shaken(attached(method, model))
    made(inputs())
    inner = made.unload()
    after = weights(inner)
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


def switches(method) -> None:
    """A second adapter on the same model, switched to and from, and all of them off."""
    x = inputs()
    plain = base()(x)
    model = shaken(attached(method, seed=1)).eval()
    first = model(x)
    wanted = goal()
    second = {"seed": 2, "adapter_name": "second", "calibrate": lambda: (model(x) - wanted).square().mean()}
    if getattr(method, "alone", False):
        with pytest.raises(LabError, match="one adapter at a time"):
            method.attach(model, fitting(method), TARGETS, **second)
        return
    method.attach(model, fitting(method), TARGETS, **second)
    model.eval()
    torch.testing.assert_close(model(x), first, rtol=1e-5, atol=1e-5)
    model.set_adapter("second")
    if method.identity_start:
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain, rtol=1e-6, atol=1e-6)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), first, rtol=1e-5, atol=1e-5)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def adapts_convolutions(method) -> None:
    layer = Layer("conv", 16, 8, (3, 3), "conv", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pictures().requires_grad_(False)
    images = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(4))
    plain = copy.deepcopy(model)(images)
    knobs = fitting(method, [layer])
    made = method.attach(model, knobs, ["conv"], calibrate=lambda: model(images).square().mean())
    if method.identity_start:
        torch.testing.assert_close(made.eval()(images), plain, rtol=1e-5, atol=1e-5)
    assert method.count([layer], knobs) == sum(p.numel() for p in made.parameters() if p.requires_grad)
    out = shaken(made).eval()(images)
    assert (out - plain).abs().max() > 1e-5
    if method.mergeable:
        made.merge_adapter()
        torch.testing.assert_close(made(images), out, rtol=1e-3, atol=1e-4)
