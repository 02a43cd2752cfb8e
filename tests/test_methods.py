"""The battery over the whole registry: a method that is added is tested by being there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from lab.errors import LabError
from lab.methods import METHODS
from lab.methods.own import OwnMethod
from tests import methods_battery as battery

ROWS = [pytest.param(m, id=m.id) for m in METHODS]
OWN = [pytest.param(m, id=m.id) for m in METHODS if isinstance(m, OwnMethod)]


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path_factory.getbasetemp() / "lab"))
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", ROWS)
def test_row_is_complete(method):
    assert method.name
    assert method.paper.title
    assert method.paper.url.startswith("https://")
    assert method.summary.endswith(".")
    assert method.equation.count("{") == method.equation.count("}")
    assert set(method.tensors) == {"trained", "frozen"}
    assert method.tensors["trained"]
    for field in dataclasses.fields(method.knobs):
        assert field.metadata["help"].endswith(".")
    assert method.knobs.parse({}) == method.knobs()


@pytest.mark.parametrize("method", ROWS)
def test_starts_at_the_base(method):
    battery.starts_at_the_base(method)


@pytest.mark.parametrize("method", ROWS)
def test_merges(method):
    if method.mergeable:
        battery.merges_exactly(method)
    else:
        model = battery.attached(method)
        with pytest.raises((LabError, ValueError, NotImplementedError, TypeError)):
            model.merge_adapter()


@pytest.mark.parametrize("method", ROWS)
def test_saves_and_loads(method, tmp_path):
    battery.saves_and_loads(method, tmp_path)


@pytest.mark.parametrize("method", ROWS)
def test_gradients_reach_the_trained_tensors_alone(method):
    battery.gradients_reach(method)


@pytest.mark.parametrize("method", ROWS)
def test_counts_right(method):
    battery.counts_right(method)


@pytest.mark.parametrize("method", ROWS)
def test_learns(method):
    battery.learns(method)


@pytest.mark.parametrize("method", ROWS)
def test_runs_in_bf16(method):
    battery.runs_in_bf16(method)


@pytest.mark.parametrize("method", OWN)
def test_lives_on_a_half_precision_base(method, tmp_path):
    battery.lives_on_a_half_precision_base(method, tmp_path)


@pytest.mark.parametrize("method", [p for p in ROWS if p.values[0].mergeable])
def test_has_the_rank_it_claims(method):
    battery.has_the_rank_it_claims(method)


@pytest.mark.parametrize("method", [p for p in ROWS if p.values[0].mergeable])
def test_delta_is_what_it_adds(method):
    battery.delta_is_what_it_adds(method)


@pytest.mark.parametrize("method", ROWS)
def test_is_seeded(method):
    battery.is_seeded(method)


@pytest.mark.parametrize("method", ROWS)
def test_unloads_clean(method):
    battery.unloads_clean(method)


@pytest.mark.parametrize("method", ROWS)
def test_switches(method):
    battery.switches(method)


@pytest.mark.parametrize("method", [p for p in ROWS if p.values[0].conv])
def test_adapts_convolutions(method):
    battery.adapts_convolutions(method)


@pytest.mark.parametrize("method", [p for p in ROWS if not p.values[0].conv])
def test_refuses_convolutions_by_name(method):
    with pytest.raises(LabError, match="conv"):
        method.attach(battery.Pictures(), method.knobs(), ["conv"], calibrate=lambda: torch.zeros(()))


@pytest.mark.parametrize("method", OWN)
def test_adapts_conv1d(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = Conv1D(48, 32), Conv1D(32, 48)

        def forward(self, x):
            return self.k(torch.tanh(self.q(x)))

    model = battery.shaken(battery.attached(method, Net().requires_grad_(False))).eval()
    x = battery.inputs()
    out = model(x)
    if method.mergeable:
        model.merge_adapter()
        torch.testing.assert_close(model(x), out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", OWN)
def test_a_damaged_file_is_one_sentence_through_peft_too(method, tmp_path):
    battery.attached(method).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    damaged = {
        whole[:-5]: "damaged or incomplete",
        b"\xff" + whole[1:]: "damaged or incomplete",
        bytes(flipped): "checksum",
    }
    for content, message in damaged.items():
        file.write_bytes(content)
        with pytest.raises(LabError, match=message):
            PeftModel.from_pretrained(battery.base(), str(tmp_path))
        with pytest.raises(LabError, match=message):
            battery.attached(method).load_adapter(str(tmp_path), "second")


def test_registry_needs_no_torch():
    code = "import sys; from lab.methods import METHODS; assert len(METHODS) > 3; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ROWS)
def test_targets_that_match_nothing(method):
    with pytest.raises(LabError, match="this model has q, k"):
        method.attach(battery.base(), battery.fitting(method), ["to_q"], calibrate=lambda: torch.zeros(()))


@pytest.mark.parametrize("method", ROWS)
def test_a_base_with_nan(method):
    model = battery.base()
    model.k.weight.data[3, 3] = float("nan")
    with pytest.raises(LabError, match="NaN"):
        battery.attached(method, model)
