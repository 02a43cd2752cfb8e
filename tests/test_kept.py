"""The base that is kept between runs of one process: put back, compared, or dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.bases import BASES, _kept
from lab.methods import METHODS
from lab.targets import modules


@pytest.fixture(autouse=True)
def settling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _kept.forget()
    monkeypatch.setattr(_kept, "sealing", True)
    yield
    _kept.forget()


def in_place(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-7  # by `.data`: torch's version counter does not see it


def swapped(pipe: Any) -> None:
    weight = pipe.text_encoder_2.text_projection.weight
    weight.data = weight.data.flip(0).contiguous()


def halved(pipe: Any) -> None:
    pipe.vae.half()


def another_class(pipe: Any) -> None:
    pipe.unet.conv_out.__class__ = type("Conv", (torch.nn.Conv2d,), {})


@pytest.mark.parametrize("damage", [in_place, swapped, halved, another_class])
def test_a_base_that_is_not_what_was_read_is_read_again(small_sdxl: Any, damage: Callable[[Any], None]) -> None:
    pipe = small_sdxl.load("cpu")
    clean = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    assert _kept.settle() == ""
    assert small_sdxl.load("cpu") is pipe
    damage(pipe)
    assert _kept.settle()
    again = small_sdxl.load("cpu")
    assert again is not pipe
    assert all(torch.equal(clean[name], p) for name, p in again.unet.state_dict().items())


def test_what_a_run_leaves_on_it_is_taken_off(small_sdxl: Any) -> None:
    pipe = small_sdxl.load("cpu")
    names = [name for name, _ in pipe.unet.named_modules()]
    told = dict(pipe.scheduler.__dict__)
    METHODS["dora"].attach(pipe.unet, METHODS["dora"].knobs.parse({}), modules(pipe.unet, "attn"), seed=0)
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    pipe.unet.conv_in.weight.requires_grad_(True).grad = torch.ones(32, 4, 3, 3)
    pipe.unet.conv_in.forward = lambda x: x
    pipe.vae.enable_tiling()
    pipe.text_encoder.note = "left"
    pipe.scheduler.set_timesteps(7)
    pipe.unet.set_attn_processor(type(next(iter(pipe.unet.attn_processors.values())))())
    processors = list(pipe.unet.attn_processors.values())
    assert _kept.settle() == ""
    assert small_sdxl.load("cpu") is pipe
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert not any(m.training or m._forward_hooks or "forward" in vars(m) for m in pipe.unet.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in pipe.unet.modules())
    assert not any(p.requires_grad or p.grad is not None for p in pipe.unet.parameters())
    assert not pipe.vae.use_tiling
    assert not hasattr(pipe.text_encoder, "note")
    assert pipe.scheduler.__dict__.keys() == told.keys()
    assert all(pipe.scheduler.__dict__[name] is told[name] for name in told)
    assert not any(a is b for a, b in zip(processors, pipe.unet.attn_processors.values(), strict=True))


def test_a_clip_model_is_lent_once_a_run() -> None:
    row = BASES["tiny-clip"]
    first, second = row.load("cpu"), row.load("cpu")
    assert first.model is not second.model
    assert _kept.settle() == ""
    assert row.load("cpu") is first
    with torch.no_grad():
        next(first.model.parameters()).add_(1)
    assert _kept.settle() == "1 of its tensors changed"
    assert row.load("cpu") is not first


def test_a_clip_model_is_nobody_elses_where_nobody_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "sealing", False)
    assert BASES["tiny-clip"].load("cpu") is not BASES["tiny-clip"].load("cpu")


def test_other_files_are_another_base(small_sdxl: Any) -> None:
    pipe = small_sdxl.load("cpu")
    config = Path(small_sdxl.source) / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    assert small_sdxl.load("cpu") is not pipe


def test_fingerprints() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3000), torch.randn(50, 60).half(), torch.arange(9), torch.zeros(0), torch.tensor(True)]
    tensors += [torch.randn(40, 50)[:, ::2], torch.randn(7, dtype=torch.complex64), torch.randn(9).bfloat16()]
    before = _kept.fingerprints(tensors)
    assert before == _kept.fingerprints([t.clone() for t in tensors])
    tensors[1][[0, 1]] = tensors[1][[1, 0]]
    tensors[0][2999] = -tensors[0][2999]
    after = _kept.fingerprints(tensors)
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, True] + 6 * [False]


def test_fingerprints_of_long_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = _kept.fingerprints([tensor])
    monkeypatch.setattr(_kept, "CHUNK", 64)
    assert _kept.fingerprints([tensor]) == whole
