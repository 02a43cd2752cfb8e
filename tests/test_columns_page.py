"""Adapters beside the methods on the Subject tab: sent, chosen, submitted; each by its owner alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lab import columns
from lab.errors import LabError
from lab.runs import Store
from lab.ui import setup
from tests import small_sdxl as small
from tests.page_server import form, ticked

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my old LoRA.safetensors"
    save_file({f"{LAYER}.lora_down.weight": torch.ones(2, 2048), f"{LAYER}.lora_up.weight": torch.ones(640, 2)}, path)
    return path


def drafted(store: Store, owner: str, **given: Any) -> dict[str, Any]:
    """The form with three pictures that this owner sent."""
    from lab.ui.drafts import Drafts

    drafts = Drafts(store.home, owner)
    return form(pictures=[drafts.add(picture.resize((64, 64)), "") for picture in small.pictures()], **given)


def test_a_sent_file_is_picked_and_submitted(store: Store, file: Path) -> None:
    known, problems = setup.send_adapters(store, "ann", [str(file)], [])
    assert problems == []
    ((title, ref),) = known.choices
    assert (title, known.value) == ("my old LoRA", [ref])
    cid = setup.submit(store, "ann", drafted(store, "ann", adapters=[ref], picker=ticked("lora"), seeds="4"))
    found = store.comparison("ann", cid)
    assert [(run.method, run.seed) for run in found.runs] == [("base", 0), ("my-old-LoRA", 4), ("lora", 4)]
    kept = found.inputs / "adapters" / "my-old-LoRA" / "adapter_model.safetensors"
    assert kept.read_bytes() == file.read_bytes()


def test_adapters_alone_are_enough(store: Store, file: Path) -> None:
    known, _ = setup.send_adapters(store, "ann", [str(file)], [])
    values = drafted(store, "ann", adapters=known.value, picker=ticked())
    assert setup.missing(values) == []
    assert "1 adapter of yours" in setup.summarise(values)
    found = store.comparison("ann", setup.submit(store, "ann", values))
    assert [run.method for run in found.runs] == ["base", "my-old-LoRA"]
    assert "tick at least one method" in setup.missing(values | {"adapters": []})


def test_a_strangers_adapter_is_none(store: Store, file: Path) -> None:
    known, _ = setup.send_adapters(store, "ann", [str(file)], [])
    for refs in (known.value, ["file:" + "0" * 24], ["file:../../x"], [str(file)], ["run:" + "0" * 24], [None]):
        with pytest.raises(LabError, match=r"not there|not found"):
            setup.submit(store, "eve", drafted(store, "eve", adapters=refs))
    assert setup.known_adapters(store, "eve", known.value).value == []
    for refs in ("file:x", {"a": 1}, ["file:" + "0" * 24] * 9):
        with pytest.raises(LabError):
            setup.submit(store, "ann", drafted(store, "ann", adapters=refs))


def test_what_is_no_adapter_is_told_and_the_rest_is_kept(store: Store, file: Path, tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    known, problems = setup.send_adapters(
        store, "ann", [str(tmp_path / "old.ckpt"), str(file), str(tmp_path / "broken.safetensors")], []
    )
    assert [title for title, _ in known.choices] == ["my old LoRA"]
    assert len(problems) == 2
    assert "pickle" in problems[0]
    assert all(str(tmp_path) not in problem for problem in problems)


def test_two_files_of_one_name_are_two_columns(store: Store, file: Path) -> None:
    known, _ = setup.send_adapters(store, "ann", [str(file)], [])
    known, _ = setup.send_adapters(store, "ann", [str(file)], known.value)
    assert list(setup.beside(store, "ann", known.value)) == ["my-old-LoRA", "my-old-LoRA-2"]
    assert set(columns.inputs(setup.beside(store, "ann", known.value))) == {
        "adapters/my-old-LoRA/adapter_model.safetensors",
        "adapters/my-old-LoRA-2/adapter_model.safetensors",
    }
