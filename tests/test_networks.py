"""Adapters on UNet and text encoders together: trained, saved, resumed, drawn with, exported; and what moves where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lab import comparison, networks, optimizers
from lab.methods import METHODS, adapters
from lab.targets import modules
from lab.tasks import Cancelled
from lab.tasks.subject import layers
from tests import small_sdxl as small


def compare(out: Path, report: Any = lambda *_, **__: None, **changes: Any) -> list[dict[str, Any]]:
    spec = comparison.start(out, "subject", small.spec(text_encoder=True, **changes), small.pictures())
    return comparison.run_all(out, "subject", spec, lambda _: report)


@pytest.mark.parametrize("id", ["lora", "nora", "nola", "vera", "adalora"])
def test_text_encoders_are_trained_saved_and_read_back(id: str, small_sdxl: Any, tmp_path: Path) -> None:
    pipe = small_sdxl.load()
    parts = {name: getattr(pipe, name) for name in ("unet", *networks.ENCODERS)}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    run = compare(tmp_path, methods={id: {}}, lr={id: 1e-2})[1]
    assert run["message"] == ""
    for name, part in parts.items():  # the base is as it was
        after = part.state_dict()
        assert after.keys() == before[name].keys()
        assert all(torch.equal(after[k], before[name][k]) for k in after)
    folder = Path(run["folder"]) / "adapter"
    assert networks.adapts_text(adapters.settings(folder))
    model = adapters.load(networks.network(pipe, True), folder)
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        assert any("text_encoder_2." in name for name in saved)
        assert any("text_encoder." in name for name in saved)
        changed = pipe.encode_prompt("a sks fox", device="cpu", do_classifier_free_guidance=False)[0]
    finally:
        model.unload()
    plain = pipe.encode_prompt("a sks fox", device="cpu", do_classifier_free_guidance=False)[0]
    assert not torch.equal(changed, plain)


def test_a_unets_adapter_names_no_text(small_sdxl: Any, tmp_path: Path) -> None:
    spec = comparison.start(tmp_path, "subject", small.spec(steps=1), small.pictures())
    run = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)[1]
    assert not networks.adapts_text(adapters.settings(Path(run["folder"]) / "adapter"))


def test_resuming_with_text_encoders_changes_nothing(small_sdxl: Any, tmp_path: Path) -> None:
    whole = compare(tmp_path / "whole")[1]

    def stop(step: int, steps: int, **values: Any) -> None:
        if step == 3 and values["phase"] == "training":
            raise Cancelled

    with pytest.raises(Cancelled):
        compare(tmp_path / "cut", stop)
    cut = compare(tmp_path / "cut")[1]
    files = [Path(run["folder"]) / "adapter" / "adapter_model.safetensors" for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_previews_and_pictures_see_the_trained_encoders(small_sdxl: Any, tmp_path: Path) -> None:
    run = compare(tmp_path, lr=0.05, steps=2, preview_every=1)[1]
    previews = [(Path(run["folder"]) / "previews" / f"{step:05d}.png").read_bytes() for step in (0, 2)]
    assert previews[0] != previews[1]


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_exports_hold_the_text_encoders(to: str, small_sdxl: Any, tmp_path: Path) -> None:
    from lab.export import export

    run = compare(tmp_path / "run", methods={"nora": {}}, steps=1)[1]
    made = export(Path(run["folder"]) / "adapter", to, tmp_path / "out", base="small-sdxl")
    assert made["relative_error"] < 1e-6
    names = set(load_file(made["files"][0]))
    prefixes = {
        "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
        "kohya": ("lora_unet_", "lora_te1_", "lora_te2_"),
    }
    for prefix in prefixes[to]:
        assert any(name.startswith(prefix) for name in names), prefix


@pytest.mark.parametrize("id", ["lora", "nora", "nola", "dora", "loha", "pissa"])
@pytest.mark.parametrize("to", ["diffusers", "merged"])
def test_a_base_held_in_bf16_is_exported_as_it_was_held(id: str, to: str, small_sdxl: Any, tmp_path: Path) -> None:
    """NoRA's outer basis is that of the weights it was trained on: rounded ones, here, of a float32 file."""
    from lab.export import export

    spec = small.spec(methods={id: {}}, lr=1e-2, steps=2, weights="bf16")
    spec = comparison.start(tmp_path / "run", "subject", spec, small.pictures())
    run = comparison.run_all(tmp_path / "run", "subject", spec, lambda _: lambda *_, **__: None)[1]
    assert run["message"] == ""
    made = export(Path(run["folder"]) / "adapter", to, tmp_path / "out", base="small-sdxl")
    if METHODS[id].low_rank:
        assert made["relative_error"] < 1e-6
    kinds = {tensor.dtype for tensor in load_file(made["files"][0]).values()}
    assert kinds == {torch.float32}
    assert small_sdxl.load("cpu", torch.bfloat16).unet.dtype == torch.bfloat16


def test_the_page_counts_what_is_trained(tmp_path: Path) -> None:
    """The embedded base's tables of layers, its text encoders' too, against what PEFT puts on it."""
    from lab.bases import BASES

    base = BASES["tiny-sdxl"]
    for id in ("lora", "nora"):
        method = METHODS[id]
        knobs = method.knobs.parse(base.preset("knobs")[id])
        whole = networks.network(base.load(), True)
        model = method.attach(whole, knobs, modules(whole, "attn"))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.unload()
        assert method.count(layers(base, "attn", text_encoder=True), knobs) == trained
        assert method.count(layers(base, "attn"), knobs) < trained


# -- compiled blocks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("id", ["lora", "nora"])
def test_compiled_blocks_change_no_result_and_are_let_go(
    id: str, small_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "BACKEND", "eager")  # traced as for any other, and not handed to a compiler
    losses = []
    for compiled in (False, True):
        changes = {"methods": {id: {}}, "steps": 2, "compile": compiled}
        spec = comparison.start(tmp_path / str(compiled), "subject", small.spec(**changes), small.pictures())
        run = comparison.run_all(tmp_path / str(compiled), "subject", spec, lambda _: lambda *_, **__: None)[1]
        assert run["message"] == ""
        losses.append(run["result"]["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not any(module._compiled_call_impl for module in small_sdxl.load().unet.modules())


def test_a_compiler_that_fails_is_told(small_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(networks, "BACKEND", broken)
    spec = comparison.start(tmp_path, "subject", small.spec(steps=1, compile=True), small.pictures())
    run = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)[1]
    assert run["message"].startswith("The UNet cannot be compiled here (")
    assert "no C++ compiler was found" in run["message"]


# -- learning rates ---------------------------------------------------------------------------------------
class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = nn.Linear(2, 2), nn.Linear(2, 2)


def test_text_encoders_learn_at_their_own_rate() -> None:
    model = Both()
    optimizer = torch.optim.AdamW(
        [{"params": [model.unet.weight, model.text_encoder.weight], "lr": 0.4}, {"params": [model.text_encoder.bias]}],
        lr=0.1,
    )
    networks.slow_text(optimizer, model, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(model.unet.weight): 0.4, id(model.text_encoder.weight): 0.2, id(model.text_encoder.bias): 0.05}


@pytest.mark.parametrize("id", METHODS.ids())
def test_every_methods_optimizer_takes_the_text_encoders_rate(id: str, small_sdxl: Any) -> None:
    method, pipe = METHODS[id], small_sdxl.load()
    whole = networks.network(pipe, True)
    names = [n for n in modules(whole, "q,v") if n.endswith(("layers.0.self_attn.q_proj", "attn1.to_q", "attn1.to_v"))]

    def calibrate() -> torch.Tensor:
        states, pooled = (
            x
            for i, x in enumerate(pipe.encode_prompt("a fox", device="cpu", do_classifier_free_guidance=False))
            if i in (0, 2)
        )
        known = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return (
            whole(noisy, torch.tensor([5]), encoder_hidden_states=states, added_cond_kwargs=known)
            .sample.square()
            .mean()
        )

    model = method.attach(whole, method.knobs(), names, calibrate=calibrate)
    try:
        optimizer = optimizers.make(method, model, 0.1, text_encoder_rate=0.5)
        plain = method.optimizer(model, 0.1)
        before = {key(p): group["lr"] for group in plain.param_groups for p in group["params"]}
        after = {key(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        text = {key(p) for p in networks.of_text(model)}
        assert before.keys() == after.keys()
        assert all(after[p] == pytest.approx(rate * (0.5 if p in text else 1.0)) for p, rate in before.items())
    finally:
        model.unload()


def key(parameter: nn.Parameter) -> int:
    return parameter.data_ptr()


# -- what is on the device --------------------------------------------------------------------------------
class Part(nn.Linear):
    """Notes where it is sent, and stays."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, device: Any) -> Any:  # type: ignore[override]
        self.sent.append(str(device))
        return self


class Pipe:
    def __init__(self, device: str) -> None:
        self.unet = type("Unet", (), {"device": torch.device(device)})()
        self.text_encoder, self.vae, self.text_encoder_2 = Part().requires_grad_(False), Part(), None


def test_parts_leave_an_accelerator_when_their_work_is_done() -> None:
    pipe = Pipe("meta")
    with networks.at_work(pipe, "text_encoder", "text_encoder_2", "vae"):
        assert pipe.text_encoder.sent == ["meta"]
    pipe.text_encoder.weight = nn.Parameter(torch.zeros(1, device="meta"), requires_grad=False)
    with networks.at_work(pipe, "text_encoder"):
        pass
    assert pipe.text_encoder.sent == ["meta", "cpu"]
    assert pipe.vae.sent == ["meta"]  # it is trained: it stays


def test_on_a_cpu_nothing_moves() -> None:
    pipe = Pipe("cpu")
    with networks.at_work(pipe, "text_encoder", "vae"):
        pass
    assert pipe.text_encoder.sent == pipe.vae.sent == []


def test_moving_keeps_the_parameters_an_optimizer_holds() -> None:
    part = nn.Linear(2, 2)
    held = list(part.parameters())
    networks.move(part, torch.device("cpu"))
    assert all(a is b for a, b in zip(held, part.parameters(), strict=True))
