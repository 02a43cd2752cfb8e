"""The training loop: against steps written out by hand, resumed, repeated, and failing as it should."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lab import device as devices
from lab.errors import LabError
from lab.methods import METHODS, Method
from lab.targets import modules
from lab.tasks import Cancelled
from lab.train import Settings, train

STEPS = 7


class Toy(Method):
    """A method whose adapter is the whole of a small network with dropout: the global generator matters too."""

    id, name = "toy", "Toy"


class ToyObjective:
    """Fit random targets; each batch is drawn at `position`, its noise from the loop's generator."""

    def __init__(self) -> None:
        self.data = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))
        self.position = 0
        self.seen: list[int] = []

    def loss(self, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        rows = [(self.position + i) % len(self.data) for i in range(3)]
        self.seen += rows
        self.position += 3
        x = self.data[rows] + 0.1 * torch.randn(3, 6, generator=generator)
        return (model(x) - x.flip(1)).square().mean()


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 6))


def silent(*_: Any, **__: Any) -> None:
    pass


def settings(**changes: Any) -> Settings:
    return Settings(**{"steps": STEPS, "lr": 0.02, "seed": 3, "checkpoint_every": 2} | changes)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_equals_steps_written_out_by_hand(tmp_path: Path) -> None:
    model = network()
    summary = train(model, Toy(), ToyObjective(), settings(schedule="cosine", warmup=2), tmp_path, silent)

    reference, objective = network(), ToyObjective()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.02, weight_decay=0.0)
    generator, expected = devices.generator(3, 1), []
    reference.train()
    for step in range(STEPS):
        done = (step - 2) / (STEPS - 2)
        optimizer.param_groups[0]["lr"] = 0.02 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * done)))
        with devices.autocast(torch.device("cpu")):
            loss = objective.loss(reference, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        expected.append((step + 1, loss.item()))
    assert losses(tmp_path) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(reference), strict=True))
    assert summary.final_loss == expected[-1][1]  # the last tenth of seven steps is one


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = network()
    train(whole, Toy(), ToyObjective(), settings(), tmp_path / "whole", silent)

    def stop(step: int, steps: int, **_: Any) -> None:
        if step == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(network(), Toy(), ToyObjective(), settings(), tmp_path / "cut", stop)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # as a killed process leaves it
    resumed, objective = network(), ToyObjective()
    train(resumed, Toy(), objective, settings(), tmp_path / "cut", silent)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    kept = stop_at - stop_at % 2  # checkpoints lie at even steps, before that step's `report`
    assert len(objective.seen) == 3 * (STEPS - kept)  # what was done before the checkpoint is not done again


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model = network()
    train(model, Toy(), ToyObjective(), settings(), tmp_path, silent)
    again, objective = network(), ToyObjective()
    train(again, Toy(), objective, settings(), tmp_path, silent)
    assert objective.seen == []
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))


def test_previews_change_nothing(tmp_path: Path) -> None:
    steps = []
    plain = network()
    train(plain, Toy(), ToyObjective(), settings(), tmp_path / "plain", silent)

    def preview(step: int) -> None:
        steps.append(step)
        assert not shown.training
        torch.randn(100)  # a preview may draw what it likes

    shown = network()
    train(shown, Toy(), ToyObjective(), settings(preview_every=3), tmp_path / "shown", silent, preview)
    assert steps == [0, 3, 6, 7]
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(shown), strict=True))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(network(), Toy(), ToyObjective(), settings(), tmp_path, silent)
    with pytest.raises(LabError, match=r"lr = 0\.02, not 0\.5"):
        train(network(), Toy(), ToyObjective(), settings(lr=0.5), tmp_path, silent)


def test_a_loss_that_is_not_finite_stops_with_step_and_cause(tmp_path: Path) -> None:
    class Overflow(ToyObjective):
        def loss(self, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
            loss = super().loss(model, generator)
            return loss * float("nan") if self.position > bad_from else loss

    bad_from = 9
    with pytest.raises(LabError, match=r"step 4 of 7: the loss is nan; the learning rate 0\.02 is probably too high"):
        train(network(), Toy(), Overflow(), settings(), tmp_path / "late", silent)
    bad_from = 0
    with pytest.raises(LabError, match=r"step 1 of 7.*the base model or a picture"):
        train(network(), Toy(), Overflow(), settings(), tmp_path / "first", silent)
    assert (tmp_path / "late" / "checkpoint" / "state.safetensors").exists()  # of step 2: good numbers


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    real, writes = Path.write_bytes, []

    def full(self: Path, data: bytes) -> int:
        writes.append(self.name)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LabError, match="disk is full"):
        train(network(), Toy(), ToyObjective(), settings(), tmp_path, silent)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["state.safetensors"]
    whole, resumed = network(), network()
    train(whole, Toy(), ToyObjective(), settings(), tmp_path / "whole", silent)
    train(resumed, Toy(), ToyObjective(), settings(), tmp_path, silent)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_method_hooks_are_called_and_kept(tmp_path: Path) -> None:
    class Counting(Toy):
        """Adds a penalty, counts steps, and keeps its count in the checkpoint."""

        def __init__(self) -> None:
            self.count = torch.zeros(1)

        def penalty(self, model: nn.Module) -> torch.Tensor:
            return sum(p.square().sum() for p in model.parameters()) * 0.01  # type: ignore[return-value]

        def after_step(self, model: nn.Module, step: int, steps: int) -> None:
            assert all(p.grad is not None for p in model.parameters())
            self.count += 1

        def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
            return {"count": self.count}

        def load_state(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
            self.count = state["count"]

    def stop(step: int, steps: int, **_: Any) -> None:
        if step == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(network(), Counting(), ToyObjective(), settings(), tmp_path, stop)
    method = Counting()
    train(network(), method, ToyObjective(), settings(), tmp_path, silent)
    assert method.count.item() == STEPS
    train(network(), Toy(), ToyObjective(), settings(), tmp_path / "plain", silent)
    assert losses(tmp_path)[0][1] > losses(tmp_path / "plain")[0][1]


def test_in_fp16_losses_are_scaled_and_an_overflowing_step_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs without bf16 do, on the CPU: the first scale (65,536) times a large loss overflows in fp16."""
    monkeypatch.setattr(devices, "compute_dtype", lambda _: torch.float16)

    class Large(ToyObjective):
        def loss(self, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
            return super().loss(model, generator) * 20

    def stop(step: int, steps: int, **_: Any) -> None:
        if step == 5:
            raise Cancelled

    start = weights(network())
    moved = network()
    train(moved, Toy(), Large(), settings(steps=1), tmp_path / "one", silent)
    assert all(torch.equal(a, b) for a, b in zip(start, weights(moved), strict=True))  # the first step overflowed
    whole = network()
    train(whole, Toy(), Large(), settings(), tmp_path / "whole", silent)
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(whole), strict=True))
    assert all(torch.isfinite(w).all() for w in weights(whole))
    cut = network()
    with pytest.raises(Cancelled):
        train(cut, Toy(), Large(), settings(), tmp_path / "cut", stop)
    resumed = network()
    train(resumed, Toy(), Large(), settings(), tmp_path / "cut", silent)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


class Attention(nn.Module):
    """One head's projections, named as diffusers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(64, 64), nn.Linear(32, 64), nn.Linear(32, 64)
        self.to_out = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = (self.to_q(x) @ self.to_k(y).mT / 8).softmax(-1)
        return self.to_out[0](weights @ self.to_v(y))


class AttentionObjective:
    position = 0

    def loss(self, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        self.position += 1
        x, y = (torch.randn(2, 5, width, generator=generator) for width in (64, 32))
        return (model(x, y) - x.roll(1, 0)).square().mean()


@pytest.mark.parametrize("id", METHODS.ids())
def test_every_method_resumes_bit_for_bit(id: str, tmp_path: Path) -> None:
    """Optimizers of their own, rank allocation, shared tensors: whatever a method keeps is in the checkpoint."""
    method = METHODS[id]

    def go(folder: Path, stop_at: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        network, objective = Attention(), AttentionObjective()
        network.requires_grad_(False)
        names = modules(network, "attn")
        calibrate = partial(objective.loss, network, devices.generator(9))
        devices.seed_everything(0)
        model = method.attach(network, method.knobs(), names, seed=0, calibrate=calibrate)

        def report(step: int, steps: int, **_: Any) -> None:
            if step == stop_at:
                raise Cancelled

        try:
            train(model, method, objective, settings(steps=4, lr=1e-3, checkpoint_every=1), folder, report)
        except Cancelled:
            assert stop_at
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", stop_at=2)
    resumed = go(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
