"""The benchmarks of SDXL at its real size, on models that have its structure and nothing its size."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import budget
from lab.bases import ASSETS, BASES, resolve
from lab.bench import _fake_step, _sdxl_random, _tables, sdxl_block, sdxl_memory, sdxl_real
from lab.methods import METHODS
from lab.tasks import TASKS, subject
from tests import small_sdxl as small


def parse(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def config(small_sdxl: Any) -> dict[str, Any]:
    return json.loads((Path(small_sdxl.source) / "unet" / "config.json").read_text())


# -- memory -------------------------------------------------------------------------------------------------
def test_the_default_comparison_fits_12_gb_at_equal_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's presets as they come: LoRA and NoRA at 1024 px."""
    spec, base = TASKS["subject"].check({"base": "sdxl", "class_word": "fox"}), BASES["sdxl"]
    assert list(spec["methods"]) == ["lora", "nora"]
    settings = {"resolution": base.resolution, "batch": spec["batch"], "checkpointing": spec["gradient_checkpointing"]}
    counts = []
    for id, knobs in spec["methods"].items():
        monkeypatch.setitem(sdxl_memory.METHODS, "preset", (id, knobs))
        assert sdxl_memory.total("preset", **settings) < sdxl_memory.usable(12), id
        parsed = METHODS[id].knobs.parse(knobs)
        counts.append(budget.count(METHODS[id], subject.layers(base, spec["targets"]), parsed))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_sdxls_ranks_are_not_taken_for_narrower_folders(small_sdxl: Any) -> None:
    folder = resolve(small_sdxl.source)
    assert folder.preset("knobs") == {}
    assert folder.preset("subject") == BASES["sdxl"].preset("subject")
    assert BASES["sdxl"].preset("knobs")["nora"]["r_outer"] > 32


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_fake_step_counts_what_a_real_one_holds(config: dict[str, Any], checkpointing: bool, train: bool) -> None:
    steps = [
        _fake_step.unet_step(
            config,
            128,
            2,
            checkpointing=checkpointing,
            train=train,
            weights=torch.bfloat16,
            precise_norms=False,
            fake=fake,
        )
        for fake in (True, False)
    ]
    assert steps[0].weights == steps[1].weights
    assert steps[0].peak == pytest.approx(steps[1].peak, rel=0.03)


def test_checkpointing_takes_less_and_batches_grow_in_a_line(config: dict[str, Any]) -> None:
    peaks = [
        _fake_step.unet_step(config, 256, batch, checkpointing=checkpointing).peak
        for checkpointing, batch in ((True, 1), (True, 2), (True, 3), (False, 2))
    ]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.05)
    assert peaks[1] < 0.8 * peaks[3]


def test_estimates_grow_with_what_is_asked_and_cards_hold_what_fits() -> None:
    plain = {"resolution": 1024, "batch": 1, "checkpointing": True}
    lora = sdxl_memory.total("LoRA, r 8", **plain)
    assert lora < sdxl_memory.total("LoRA, r 64", **plain) < sdxl_memory.total("NoRA, r_outer 0.8", **plain)
    assert lora < sdxl_memory.total("LoRA, r 8", text_encoder=True, **plain)
    assert sdxl_memory.total("LoRA, r 64", eight_bit=True, **plain) < sdxl_memory.total("LoRA, r 64", **plain)
    assert sdxl_memory.total("LoRA, r 8", **plain | {"resolution": 512}) < lora
    most = [sdxl_memory.largest("LoRA, r 8", card) for card in sdxl_memory.CARDS]
    for small_card, large_card in itertools.pairwise(most):
        assert all(small_card[key] <= large_card[key] for key in small_card)
    fits = most[2]["with"]
    if 0 < fits < sdxl_memory.LARGEST:
        room = sdxl_memory.usable(24)
        assert sdxl_memory.total("LoRA, r 8", **plain | {"batch": fits}) <= room
        assert sdxl_memory.total("LoRA, r 8", **plain | {"batch": fits + 1}) > room


def test_every_method_of_the_table_is_in_it() -> None:
    made = sdxl_memory.run(parse(sdxl_memory))
    text = sdxl_memory.table(made)
    assert all(f"| {name} |" in text for name in sdxl_memory.METHODS)
    assert all(f"| {card} |" in text for card in sdxl_memory.CARDS)
    sizes = list(made["drawing"].values())
    assert sizes == sorted(sizes, reverse=True)


def test_parts_of_a_table_are_replaced_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    _tables.write(path, "a", "one", "# Head\n")
    _tables.write(path, "b", "two", "# Head\n")
    _tables.write(path, "a", "three", "# Head\n")
    assert path.read_text() == "# Head\n\n<!-- a -->\nthree\n<!-- /a -->\n\n<!-- b -->\ntwo\n<!-- /b -->\n"


# -- steps ----------------------------------------------------------------------------------------------------
def test_blocks_are_measured_against_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl_block, "BLOCKS", {"64": (64, 2, 16, 10), "32": (32, 2, 16, 60)})
    names = ("LoRA, r 8", "NOLA, hadamard, r 8")
    monkeypatch.setattr(sdxl_block, "CANDIDATES", {name: sdxl_block.CANDIDATES[name] for name in names})
    made = sdxl_block.run(parse(sdxl_block, "--repetitions", "1"))
    assert made["to_lora"]["LoRA, r 8"] == 1.0
    seconds = made["seconds"]
    weighted = {c: 10 * seconds["64"][c] + 60 * seconds["32"][c] for c in names}
    assert made["to_lora"][names[1]] == pytest.approx(weighted[names[1]] / weighted[names[0]])
    assert "| NOLA, hadamard, r 8 |" in sdxl_block.table(made)


def test_the_whole_unet_is_measured_and_left_as_it_was(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sdxl_random, "released", lambda part: config)
    monkeypatch.setattr(sdxl_block, "CANDIDATES", {"LoRA, r 8": ("lora", {"r": 8}), "NoRA": ("nora", {"r_outer": 0.5})})
    found = sdxl_block.whole(torch.device("cpu"), 1, 1)
    assert found.keys() == {"LoRA, r 8", "NoRA"}
    assert all(seconds > 0 for seconds in found.values())


# -- the whole path ---------------------------------------------------------------------------------------------
def test_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sdxl_random, "build", lambda folder: small.build(folder, "epsilon", False))
    monkeypatch.setattr(sdxl_real, "ID", "sdxl-small-random")
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    try:
        words = ("--folder", str(tmp_path / "base"), "--resolution", "32", "--r-outer", "0.5")
        made = sdxl_real.run(parse(sdxl_real, *words))
    finally:
        BASES._members.pop("sdxl-small-random", None)
    assert [(r["method"], r["state"]) for r in made["runs"]] == [("base", "done"), ("lora", "done"), ("nora", "done")]
    phases = {(p["run"], p["phase"]) for p in made["phases"]}
    for method in ("lora", "nora"):
        assert {(method, "measuring one step's memory"), (method, "training"), (method, "training, resumed")} <= phases
        assert {
            (method, "saving the adapter"),
            (method, "exporting as diffusers"),
            (method, "exporting as kohya"),
        } <= phases
    assert ("nora", "factorising the weights") in phases
    assert all(x["error"] < 1e-6 for x in made["exports"])
    assert "| nora | 0." not in sdxl_real.table(made)
    assert sdxl_real.table(made).count("| kohya |") == 2
    assert Path(tmp_path / "home").exists() is False  # what it keeps meanwhile is elsewhere


def test_the_random_base_is_of_the_released_shapes() -> None:
    """Not built here, being 7 GB: its configurations are those whose layers the budget counts."""
    from lab import architectures
    from lab.layer_tables import build

    with torch.device("meta"):
        unet = build(_sdxl_random.released("unet"))
    assert sum(p.numel() for p in unet.parameters()) == architectures.load("sdxl-unet").parameters
    index = json.loads((ASSETS / "tiny-sdxl" / "model_index.json").read_text())
    assert {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"} <= index.keys()
