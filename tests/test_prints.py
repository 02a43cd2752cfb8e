"""A comparison knows the weights it was begun with, and refuses to go on with others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab import comparison
from lab.bases import BASES, Base, _prints, resolve
from lab.errors import LabError
from lab.jobs import child
from lab.tasks import TASKS
from tests import small_sdxl as small

ROOT = Path(__file__).resolve().parents[1]
CHANGED = (
    r"^The base model moving has changed since this comparison began \((\S+)\), and its runs would not be of one base"
)


@pytest.fixture
def moving(small_sdxl: Base, tmp_path: Path) -> Any:
    """A base in a folder of its own, which may change."""
    row = dataclasses.replace(small_sdxl, id="moving", name="moving", source=str(tmp_path / "base"))
    shutil.copytree(small_sdxl.source, row.source)
    yield BASES.register(row)
    BASES._members.pop("moving")
    row.forget()


def train_on(file: Path) -> None:
    """Every number a little different: sizes, names and shapes stay."""
    save_file({key: value + 1e-3 for key, value in load_file(file).items()}, file)


def quiet(_: Any) -> Any:
    return lambda *_, **__: None


def test_a_folder_is_not_resumed_on_other_weights(moving: Base, tmp_path: Path) -> None:
    out, spec = tmp_path / "out", small.spec(base="moving", steps=1, methods={"lora": {}})
    runs = comparison.run_all(out, "subject", comparison.start(out, "subject", spec, small.pictures()), quiet)
    assert [run["state"] for run in runs] == ["done", "done"]
    assert str(tmp_path) not in (out / _prints.FILE).read_text()
    comparison.start(out, "subject", spec, small.pictures())  # the same weights: goes on
    train_on(Path(moving.source) / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(LabError, match=CHANGED) as told:
        comparison.start(out, "subject", spec, small.pictures())
    assert "vae/diffusion_pytorch_model.safetensors" in str(told.value)


def test_a_queued_run_is_not_resumed_on_other_weights(moving: Base, tmp_path: Path) -> None:
    """The second attempt finds in the comparison's folder what the first wrote."""
    spec = comparison.start(
        tmp_path / "c", "subject", small.spec(base="moving", methods={"lora": {}}), small.pictures()
    )
    orders = {"task": "subject", "method": "base", "seed": 0, "knobs": {}, "spec": spec, "inputs": "c/inputs"}
    progress = child.Progress(tmp_path / "progress.json")
    child._run(tmp_path, orders, tmp_path / "c" / "runs" / "base-s0", progress)
    train_on(Path(moving.source) / "unet" / "diffusion_pytorch_model.safetensors")
    moving.forget()
    with pytest.raises(LabError, match=CHANGED) as told:
        child._run(tmp_path, orders, tmp_path / "c" / "runs" / "base-s0", progress)
    assert child.explain(told.value, tmp_path) == (child.FAILED, str(told.value))


def test_a_few_shot_folder_is_not_resumed_on_other_weights(tmp_path: Path) -> None:
    model, out = tmp_path / "clip", tmp_path / "out"
    shutil.copytree(ROOT / "assets" / "tiny-clip", model)
    given = {"base": str(model), "dataset": "digits", "methods": {"zero-shot": {}}, "shots": [1], "seeds": [1]}
    runs = comparison.run_all(out, "fewshot", comparison.start(out, "fewshot", given, []), quiet)
    assert [run["state"] for run in runs] == ["done"]
    comparison.start(out, "fewshot", given, [])
    train_on(model / "open_clip_model.safetensors")
    with pytest.raises(LabError, match=r"has changed since this comparison began \(open_clip_model\.safetensors\)"):
        comparison.start(out, "fewshot", given, [])
    more = comparison.run_all(out, "fewshot", TASKS["fewshot"].check(given | {"seeds": [1, 2]}), quiet)
    assert [run["state"] for run in more] == ["done", "failed"]
    assert "start a new comparison, or put the old files back" in more[1]["message"]


def test_every_tensor_and_every_configuration_counts(small_sdxl: Base, tmp_path: Path) -> None:
    shutil.copytree(small_sdxl.source, tmp_path / "model")
    row = resolve(str(tmp_path / "model"))
    before, file = _prints.prints(row), tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert _prints.prints(row) == before
    tensors = load_file(file)
    for key in list(tensors)[::40]:
        save_file(tensors | {key: tensors[key] + 1e-3}, file)
        assert {f for f, v in _prints.prints(row).items() if before[f] != v} == {
            "unet/diffusion_pytorch_model.safetensors"
        }
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    assert _prints.prints(row)["scheduler/scheduler_config.json"] != before["scheduler/scheduler_config.json"]


def test_what_comes_later_changes_nothing_and_what_goes_does(small_sdxl: Base, tmp_path: Path) -> None:
    shutil.copytree(small_sdxl.source, tmp_path / "model")
    row, out = resolve(str(tmp_path / "model")), tmp_path / "out"
    out.mkdir()
    row.hold(out)
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    row.hold(out)
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(LabError, match="The base model model has changed since this comparison began"):
        row.hold(out)


def test_a_single_file_a_broken_one_and_a_base_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4096), "b": torch.zeros(3)}, file)
    row = resolve(str(file))
    before = _prints.prints(row)
    assert before.keys() == {"model.safetensors"}
    save_file({"a": torch.zeros(4096), "b": torch.ones(3)}, file)
    assert _prints.prints(row) != before
    for broken in (b"", b"x", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (30).to_bytes(8, "little") + b"{}"):
        file.write_bytes(broken)
        assert _prints.prints(row).keys() == before.keys()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    BASES["sdxl"].hold(tmp_path)
    assert not (tmp_path / _prints.FILE).exists()
