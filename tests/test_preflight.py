"""The step before the first: it measures, says what to change, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import comparison, device, preflight
from lab.errors import LabError
from lab.methods import METHODS
from lab.targets import modules
from lab.train import train
from tests import small_sdxl as small
from tests.test_train import Attention, AttentionObjective, Toy, ToyObjective, network, settings, silent, weights

GIB = 2**30


@pytest.mark.parametrize("id", METHODS.ids())
def test_it_changes_nothing(id: str, tmp_path: Path) -> None:
    """The run after it is the run without it, bit for bit, whatever the method keeps."""
    method = METHODS[id]

    def go(folder: Path, fly: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        whole, objective = Attention().requires_grad_(False), AttentionObjective()
        device.seed_everything(0)
        model = method.attach(
            whole, method.knobs(), modules(whole, "attn"), calibrate=lambda: objective.loss(whole, device.generator(9))
        )
        objective.position = 0
        if fly:
            preflight.fly(model, method, objective, settings(steps=2, lr=1e-3))
            assert objective.position == 0
            assert all(p.grad is None for p in model.parameters())
        train(model, method, objective, settings(steps=2, lr=1e-3), folder, silent)
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    pairs = zip(go(tmp_path / "plain", False), go(tmp_path / "flown", True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_counts_the_process_and_the_optimizers_averages() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.register_parameter("large", torch.nn.Parameter(torch.zeros(2**25)))
    adamw = preflight.fly(model, Toy(), Large(), settings())
    small_state = preflight.fly(model, Toy(), Large(), settings(optimizer="adamw8bit"))
    held = device.resident()
    assert adamw.peak > held + 2 * 4 * 2**25  # the averages are not there yet, and are counted
    assert 5 * 2**25 < adamw.peak - small_state.peak < 8 * 2**25  # 8 bytes a number, and 2
    assert adamw.available > adamw.peak
    assert adamw.sentence.startswith(("fits: ", "tight: "))


class Large(ToyObjective):
    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        return model.large.square().mean()


def test_a_run_that_does_not_fit_is_told_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "room", lambda _: GIB // 1000)
    with pytest.raises(LabError) as caught:
        preflight.fly(network(), Toy(), ToyObjective(), settings(), lambda: ["lower the batch from 4 to 2"])
    sentence = str(caught.value)
    assert sentence.startswith("This run does not fit: a step and the optimizer's state take ")
    assert sentence.endswith("GiB of 0.0; lower the batch from 4 to 2.")


def test_memory_that_runs_out_in_the_step_is_told_the_same_way() -> None:
    class Hungry(ToyObjective):
        def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
            self.position += 3
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model, objective = network(), Hungry()
    before = weights(model)
    with pytest.raises(LabError, match=r"This run does not fit: one step needs more than .* GiB there are; take"):
        preflight.fly(model, Toy(), objective, settings(), lambda: ["take less"])
    assert objective.position == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_tight_is_said() -> None:
    assert preflight.Flight(9 * GIB, 24 * GIB).sentence == "fits: 9.0 of 24.0 GiB"
    assert preflight.Flight(23 * GIB, 24 * GIB).sentence == "tight: 23.0 of 24.0 GiB"


def test_what_to_change_comes_in_the_order_of_its_use() -> None:
    spec = small.spec(gradient_checkpointing=False, batch=4, text_encoder=True, optimizer="adamw", resolution=None)
    found = preflight.changes(spec, 2 * 10**8)
    assert [words.split()[0] for words in found] == ["turn", "lower", "leave", "take", "lower", "lower"]
    assert found[1] == "lower the batch from 4 to 2"
    least = small.spec(gradient_checkpointing=True, batch=1, text_encoder=False, optimizer="adamw8bit", resolution=512)
    assert preflight.changes(least, 10) == ["lower the method's rank, or adapt fewer layers"]


def test_a_container_may_have_less_than_the_machine() -> None:
    assert 0 < preflight.available_memory() < 2**50
    assert preflight.room(torch.device("cpu")) > preflight.available_memory() - GIB


def test_a_run_tells_it_and_keeps_it(small_sdxl: Any, tmp_path: Path) -> None:
    phases: list[str] = []
    spec = comparison.start(tmp_path, "subject", small.spec(steps=1), small.pictures())
    runs = comparison.run_all(
        tmp_path, "subject", spec, lambda _: lambda step, steps, **values: phases.append(values["phase"])
    )
    told = runs[1]["result"]["preflight"]
    assert told in phases
    assert phases.index("measuring one step's memory") < phases.index(told) < phases.index("training")
    written = json.loads((Path(runs[1]["folder"]) / "preflight.json").read_text())
    assert written["told"] == told
    assert 0 < written["peak_bytes"] < written["available_bytes"]


def test_a_run_that_does_not_fit_fails_with_the_sentence_and_leaves_the_base(
    small_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "room", lambda _: GIB // 1000)
    spec = comparison.start(tmp_path, "subject", small.spec(steps=1, batch=2), small.pictures())
    run = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)[1]
    assert run["state"] == "failed"
    assert run["message"].endswith("turn gradient checkpointing on.")
    assert not any("lora" in name for name, _ in small_sdxl.load().unet.named_modules())


def test_the_row_of_a_running_run_shows_it(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from lab.ui import rendering

    run: Any = SimpleNamespace(
        state="running", cancelling=False, phase="training", preflight=lambda: "fits: 1.0 of 8.0 GiB"
    )
    assert rendering.now(run) == "training · fits: 1.0 of 8.0 GiB"
