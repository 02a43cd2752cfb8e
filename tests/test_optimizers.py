"""The 8-bit optimizer: a clear sentence without it, the same groups with it, and its state in a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lab import comparison, optimizers
from lab.errors import LabError
from lab.methods import METHODS
from lab.tasks import TASKS
from tests import small_sdxl as small
from tests.test_train import Toy, ToyObjective, losses, network, settings, silent, train, weights


class Eight(torch.optim.AdamW):
    """Stands for bitsandbytes' AdamW8bit: its arguments, and a state with bytes in it."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for state in self.state.values():
            state["state1"] = torch.full((3,), 7, dtype=torch.uint8)
        return found


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(params: Any, lr: float, betas: Any, eps: float, weight_decay: float) -> Eight:
        return Eight(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=made))
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)  # type: ignore[arg-type]


def test_without_bitsandbytes_one_sentence_says_what_to_do(
    small_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    spec = comparison.start(tmp_path, "subject", small.spec(steps=1, optimizer="adamw8bit"), small.pictures())
    run = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)[1]
    assert run["message"] == (
        "The 8-bit optimizer needs bitsandbytes, which is not installed here: pip install bitsandbytes, or take adamw."
    )


def test_it_takes_over_every_group(bitsandbytes: None) -> None:
    class Grouped(Toy):
        def optimizer(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
            first, *rest = model.parameters()
            return torch.optim.AdamW([{"params": [first], "lr": 16 * lr}, {"params": rest}], lr=lr, weight_decay=0.1)

    model = network()
    made = optimizers.make(Grouped(), model, 0.5, kind="adamw8bit")
    assert isinstance(made, Eight)
    assert [group["lr"] for group in made.param_groups] == [8.0, 0.5]
    assert {group["weight_decay"] for group in made.param_groups} == {0.1}
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))


def test_a_method_with_an_optimizer_of_its_own_is_refused(bitsandbytes: None) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    method = METHODS["lora-pro"]
    adapted = method.attach(model, method.knobs(), ["0"])
    with pytest.raises(LabError, match="LoRA-Pro brings an optimizer of its own"):
        optimizers.make(method, adapted, 0.1, kind="adamw8bit")


def test_bytes_of_its_state_are_in_the_checkpoint(bitsandbytes: None, tmp_path: Path) -> None:
    from lab.tasks import Cancelled

    def stop(step: int, steps: int, **_: Any) -> None:
        if step == 3:
            raise Cancelled

    whole, resumed = network(), network()
    train(whole, Toy(), ToyObjective(), settings(optimizer="adamw8bit"), tmp_path / "whole", silent)
    with pytest.raises(Cancelled):
        train(network(), Toy(), ToyObjective(), settings(optimizer="adamw8bit"), tmp_path / "cut", stop)
    train(resumed, Toy(), ToyObjective(), settings(optimizer="adamw8bit"), tmp_path / "cut", silent)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": "adam8bit"}, "Unknown optimizer 'adam8bit': did you mean adamw8bit"),
        ({"weights": "int8"}, "Unknown weights 'int8'"),
        ({"text_encoder": "yes"}, "text_encoder must be true or false"),
        ({"buckets": 1}, "buckets must be true or false"),
        ({"text_encoder_rate": -1}, "text_encoder_rate must be between"),
    ],
)
def test_bad_settings_get_one_clear_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError) as caught:
        TASKS["subject"].check({"class_word": "fox"} | changes)
    assert sentence in str(caught.value)
