"""Adapters on a base loaded in 8 or 4 bits, where bitsandbytes (an optional extra) is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lab.methods import METHODS

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional extra: pip install bitsandbytes")


def four_bits(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return made.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


@pytest.mark.parametrize("quantise", [four_bits, eight_bits], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method_id", ["nora", "nola", "pranc"])
def test_on_a_quantised_base(quantise, method_id, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, x = nn.Sequential(quantise(nn.Linear(64, 64))).requires_grad_(False), torch.randn(8, 64)
    plain = base(x)
    method = METHODS[method_id]
    model = method.attach(base, method.knobs(), ["0"])
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    changed = model(x)
    changed.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    model(x)
    model.unmerge_adapter()
    assert torch.equal(model(x), changed)
