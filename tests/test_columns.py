"""Adapters that are there already as columns: every layout, on UNet and text encoders, drawn as what they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab import adapter_files, columns, comparison, targets
from lab.bases import BASES
from lab.errors import LabError
from lab.export import export
from lab.methods import METHODS
from lab.networks import network
from lab.tasks import TASKS
from tests import small_sdxl as small


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.set_num_threads(1)
    return BASES["tiny-sdxl"].load("cpu", torch.float32)


@torch.no_grad()
def draw(pipe: Any) -> torch.Tensor:
    made = pipe("a fox", num_inference_steps=2, guidance_scale=2.0, height=64, width=64,
                generator=torch.Generator().manual_seed(0), output_type="pt")  # fmt: skip
    return made.images[0]


def shaken(pipe: Any, method_id: str, folder: Path, roles: str = "attn,conv", text: bool = False, **knobs: Any) -> Any:
    """The picture that an adapter makes, which is saved in the folder."""
    method, whole = METHODS[method_id], network(pipe, text_encoders=text)
    model = method.attach(whole, method.knobs.parse(knobs), targets.modules(whole, roles)[::7], seed=3)
    noise = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=noise) * (1.0 if p.dim() == 1 else 0.1))
    for config in model.peft_config.values():
        config.base_model_name_or_path = "tiny-sdxl"
    model.save_pretrained(folder, save_embedding_layers=False)
    picture = draw(pipe)
    model.unload()
    return picture


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "own"])
@pytest.mark.parametrize(
    ("method", "roles", "text"),
    [("lora", "attn,conv", False), ("nora", "attn,conv", False), ("lora", "attn", True), ("nola", "attn", True)],
)
def test_a_column_draws_what_the_adapter_drew(
    pipe: Any, tmp_path: Path, layout: str, method: str, roles: str, text: bool
) -> None:
    wanted, plain = shaken(pipe, method, tmp_path / "adapter", roles, text), draw(pipe)
    file = tmp_path / "adapter"
    if layout != "own":
        file = Path(export(file, layout, tmp_path / "old.safetensors")["files"][0])
    found = columns.of_files([file])
    columns.keep(found, tmp_path / "out")
    with columns.laid(BASES["tiny-sdxl"], pipe, tmp_path / "out", next(iter(found))):
        again = draw(pipe)
    assert (wanted - plain).abs().max() > 4 / 255, "the adapter changes nothing to compare"
    assert (wanted - again).abs().max() <= 1 / 255
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(("method", "knobs"), [("loha", {"r": 8}), ("lokr", {"r": 4}), ("dora", {"r": 4})])
def test_updates_without_factors(pipe: Any, tmp_path: Path, method: str, knobs: dict[str, Any]) -> None:
    wanted = shaken(pipe, method, tmp_path / "adapter", "attn", **knobs)
    columns.keep({"old": tmp_path / "adapter"}, tmp_path / "out")
    with columns.laid(BASES["tiny-sdxl"], pipe, tmp_path / "out", "old"):
        assert (draw(pipe) - wanted).abs().max() <= 1 / 255


def test_names() -> None:
    assert columns.named(["my old LoRA.safetensors", "my old LoRA.zip", "LoRA.safetensors", "../../x.safetensors", "日本"]) == [
        "my-old-LoRA", "my-old-LoRA-2", "LoRA-2", "x", "adapter",
    ]  # fmt: skip
    for name in columns.named(["base", "nora.safetensors", "a" * 200, "-x-", "a b\n<script>"]):
        assert columns.checked([name]) == [name]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("x", "must be a list of names"),
        ([1], "must be a list of names"),
        (["../x"], "cannot be an adapter's name"),
        (["a/b"], "cannot be an adapter's name"),
        (["a..b"], "cannot be an adapter's name"),
        (["lora"], "is a method's name"),
        (["base"], "is a method's name"),
        (["a", "a"], "different names"),
        ([f"a{i}" for i in range(9)], "At most 8 adapters"),
    ],
)
def test_bad_names(value: Any, sentence: str) -> None:
    with pytest.raises(LabError, match=sentence):
        TASKS["subject"].check({"class_word": "fox", "adapters": value})


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="There is no adapter"):
        columns.of_files([tmp_path / "nothing.safetensors"])
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(LabError, match="is a pickle"):
        columns.of_files([tmp_path / "old.ckpt"])
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(LabError, match="broken"):
        columns.of_files([tmp_path / "broken.safetensors"])
    with pytest.raises(LabError, match="broken"):
        columns.keep({"broken": tmp_path / "broken.safetensors"}, tmp_path / "out")
    assert not (tmp_path / "out" / "adapters").exists()


def test_an_adapter_of_another_base(pipe: Any, tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    file = {f"{name}.lora_down.weight": torch.ones(2, 2048), f"{name}.lora_up.weight": torch.ones(640, 2)}
    save_file(file, tmp_path / "xl.safetensors")
    columns.keep({"xl": tmp_path / "xl.safetensors"}, tmp_path / "out")
    with (
        pytest.raises(LabError, match="'xl' was made for"),
        columns.laid(BASES["tiny-sdxl"], pipe, tmp_path / "out", "xl"),
    ):
        pass
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_a_column_beside_the_methods(small_sdxl: Any, tmp_path: Path) -> None:
    """The run of an adapter that was trained here is, as a column of another comparison, the very same pictures."""
    spec = small.spec(methods={"lora": {}}, unrelated_prompts=["a dog"])
    first = tmp_path / "first"
    comparison.run_all(first, "subject", comparison.start(first, "subject", spec, small.pictures()), quiet)
    adapter = first / "runs" / "lora-s0" / "adapter"
    found = columns.of_files([adapter])
    assert list(found) == ["lora-s0"]
    second = tmp_path / "second"
    spec = spec | {"methods": {"nora": {}}, "adapters": list(found), "seeds": [5]}
    spec = comparison.start(second, "subject", spec, small.pictures(), found)
    runs = comparison.run_all(second, "subject", spec, quiet)
    assert [(r["method"], r["seed"], r["state"]) for r in runs] == [
        ("base", 0, "done"),
        ("lora-s0", 5, "done"),
        ("nora", 5, "done"),
    ]
    old = json.loads((first / "runs" / "lora-s0" / "result.json").read_text())
    new = runs[1]["result"]
    assert new["trainable_parameters"] == old["trainable_parameters"]
    assert new["adapter_bytes"] == old["adapter_bytes"]
    assert new["clip_i"] == pytest.approx(old["clip_i"], abs=2e-3)
    assert new["drift"] == pytest.approx(old["drift"], abs=2e-3)
    from lab import compare

    files = compare.write_report(second, spec, runs)
    assert all(path.is_file() for path in files)
    assert not any("lora-s0 trains" in said for said in compare.verdicts(compare.table(runs)))


def test_adapters_alone_train_nothing(small_sdxl: Any, tmp_path: Path) -> None:
    state = {f"unet.{n}.lora_{k}.weight": torch.ones(s) * 0.01 for n in targets.modules(small_sdxl.load().unet, "q")[:1]
             for k, s in (("A", (1, small_sdxl.load().unet.get_submodule(n).in_features)),
                          ("B", (small_sdxl.load().unet.get_submodule(n).out_features, 1)))}  # fmt: skip
    save_file(state, tmp_path / "old.safetensors")
    spec = small.spec(methods={}, adapters=["old"])
    spec = comparison.start(tmp_path / "out", "subject", spec, small.pictures(), {"old": tmp_path / "old.safetensors"})
    runs = comparison.run_all(tmp_path / "out", "subject", spec, quiet)
    assert [r["method"] for r in runs] == ["base", "old"]
    assert all(r["state"] == "done" for r in runs), [r["message"] for r in runs]
    assert load_file(tmp_path / "out" / "inputs" / "adapters" / "old" / adapter_files.WEIGHTS).keys() == state.keys()


def quiet(_planned: Any) -> Any:
    return lambda *_, **__: None
