"""The Budget tab: its plain functions and what it copies (tests/browser/test_budget_tab.py visits it)."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import budget_copy, budget_report
from lab.cli import main, parser
from lab.errors import LabError
from lab.methods import METHODS
from lab.plots import PLOTS
from lab.ui import budget as tab

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "arch": "gpt2",
    "targets": ["q", "v"],
    "methods": {"lora": {"r": 2}, "nora": {"r_outer": 64}, "nola": {"k": 9}},
}


# -- the report --------------------------------------------------------------------------------------------
def test_the_default_is_a_worked_example() -> None:
    report = budget_report.report(budget_report.DEFAULT)
    assert [row["id"] for row in report["rows"]] == ["lora", "nora", "nola", "dora", "vera"]
    assert all(row["count"] and not row["error"] for row in report["rows"])
    assert report["arch"]["floor"] == 1_451_520
    lora, nola = report["rows"][0], report["rows"][2]
    assert nola["below_lora"] == pytest.approx(lora["count"] / nola["count"])
    assert nola["memory"]["training"] > nola["memory"]["adapter"] > 0
    assert {"curve", "layers", "kinds", "files"} == set(report["figures"])


def test_equal_budget_solves_every_row_and_says_who_cannot() -> None:
    report = budget_report.report({**SMALL, "budget": 10_000})
    rows = {row["id"]: row for row in report["rows"]}
    assert rows["lora"]["note"] == "LoRA's floor here is 36,864: rank 1"
    assert abs(rows["nola"]["miss"]) <= 12
    assert rows["nola"]["count"] == 10_000 + rows["nola"]["miss"]


def test_settings_that_do_not_fit_are_a_sentence_in_their_row() -> None:
    report = budget_report.report({**SMALL, "methods": {"lora": {"r": 9999}, "nora": {"r_inner": "four"}, "nola": {}}})
    lora, nora, nola = report["rows"]
    assert "9999" in lora["error"]
    assert "r_inner must be a number" in nora["error"]
    assert nola["count"]
    assert all(trace["name"] != "LoRA" for trace in report["figures"]["files"]["data"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arch": "sdxl"}, "Unknown architecture"),
        ({"arch": "own-0000"}, "no longer has this architecture"),
        ({"targets": ["gate"]}, "has no layer called gate"),
        ({"targets": []}, "No layers were chosen"),
        ({"blocks": [5, 2]}, "must grow"),
        ({"blocks": "x"}, "two whole numbers"),
        ({"methods": {"lorra": {}}}, "Unknown method"),
        ({"methods": {"lora": {"r": [1]}}}, "must be a number or a short text"),
        ({"methods": "lora"}, "at most"),
        ({"budget": 0}, "at least 1"),
        ({"budget": -1}, "at least 1"),
        ({"budget": 10**15}, "larger than any model"),
        ({"batch": 0}, "must be between"),
        ({"size": "wide"}, "must be a number"),
        ({"precision": "fp1"}, "precision is one of"),
    ],
)
def test_bad_states(change: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        budget_report.report({**SMALL, **change})
    assert said.replace("\\", "") in tab.budget_report_({**SMALL, **change})["error"]


def test_a_link_brings_the_state_back() -> None:
    states = [
        budget_report.DEFAULT,
        SMALL,
        {**SMALL, "budget": 5000, "blocks": [1, 4], "batch": 3, "precision": "fp32"},
    ]
    states.append({"arch": "sdxl-unet", "te": True, "targets": ["q"], "size": 0.5})
    states.append({"arch": "clip-vit-b32", "part": "vision", "targets": ["up", "down"]})
    for state in states:
        report = budget_report.report(state)
        again = budget_report.report(budget_report.from_link(report["link"]))
        assert again["link"] == report["link"]
        for key in ("rows", "arch", "figures"):
            assert again[key] == report[key]
    assert "error" in tab.budget_link({"m": "x" * 3000})
    assert "error" in tab.budget_link("no query")


def test_text_encoders_add_their_layers_and_parameters() -> None:
    one, two = (
        budget_report.report({"arch": "sdxl-unet", "te": te, "methods": {"lora": {"r": 1}}}) for te in (False, True)
    )
    assert two["arch"]["layers"] - one["arch"]["layers"] == 12 * 4 + 32 * 4
    extra = 12 * 4 * 2 * 768 + 32 * 4 * 2 * 1280
    assert two["rows"][0]["count"] - one["rows"][0]["count"] == extra


def test_every_method_of_the_registry_can_be_shown() -> None:
    ids = METHODS.ids()
    for start in range(0, len(ids), budget_report.MAX_METHODS):
        chosen = ids[start : start + budget_report.MAX_METHODS]
        state = {"arch": "tiny-sdxl", "methods": {id: {} for id in chosen}, "budget": 30_000}
        for row in budget_report.report(state)["rows"]:
            assert row["count"], (row["id"], row["error"])
            for spec in row["controls"]:
                assert spec["low"] <= spec["high"]


def test_blocks_add_up_to_the_count() -> None:
    report = budget_report.report({**SMALL, "methods": {"lora": {}, "vera": {}}})
    for by in ("layers", "kinds"):
        for trace, row in zip(report["figures"][by]["data"], report["rows"], strict=True):
            assert sum(y or 0 for y in trace["y"]) == row["count"]
    [lora, _] = budget_report.report({**SMALL, "targets": ["q", "out"], "methods": {"lora": {}, "vera": {}}})[
        "figures"
    ]["kinds"]["data"]
    assert (lora["x"], lora["y"]) == (["q", "out"], [12 * 4 * 2 * 768] * 2)


def test_a_rank_that_costs_nothing_has_a_slider_too() -> None:
    rows = budget_report.report({**SMALL, "budget": 20_000, "methods": {"nola": {"r": 3}}})["rows"]
    slider = next(c for c in rows[0]["controls"] if c["name"] == "r")
    assert (slider["size"], slider["high"], rows[0]["knobs"]["r"]) == (False, 768, 3)
    assert abs(rows[0]["miss"]) <= 12


def test_the_whole_tab_answers_before_torch_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from lab.ui.page import application
application({str(tmp_path)!r})
from lab.ui import budget as tab
state = tab.budget_report_({SMALL | {"budget": 50_000}!r})["state"]
texts = [tab.budget_copy_({{"state": state, "what": what}}) for what in ("csv", "markdown", "peft", "command")]
brought = tab.budget_bring({{"kind": "table", "text": "q 64 32 times 3"}})
eq = tab.budget_equations(dict(L=32, q=2, n=4096, r=16, r_out=2000, r_in=16))
assert all("text" in t for t in texts) and "id" in brought and eq["lora"] and tab.initial() and tab.calculator()
assert "state" in tab.budget_link({{"arch": "gpt2", "budget": "9000"}})
print([name for name in ("torch", "diffusers", "open_clip", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr[-2000:]


# -- architectures that a visitor brings ---------------------------------------------------------------------
def test_a_pasted_table_is_an_architecture_of_the_page() -> None:
    answer = tab.budget_bring({"kind": "table", "text": "q 64 32 times 3\nup 128 32"})
    assert (answer["layers"], answer["targets"]) == (4, ["q"])
    report = budget_report.report({"arch": answer["id"], "targets": answer["targets"], "methods": {"lora": {"r": 1}}})
    assert report["rows"][0]["count"] == 3 * 96
    assert report["rows"][0]["memory"]["training"] is None  # a table of shapes does not say what is kept


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "config", "text": "{"}, "is not JSON"),
        ({"kind": "config", "text": " " * 2_000_000}, "has 2.0 MB"),
        ({"kind": "config", "text": '{"a":' * 1000 + "1" + "}" * 1000}, "nested"),
        ({"kind": "table", "text": "x 1"}, "cannot be read"),
        ({"kind": "hub", "text": "gpt2"}, "no model's name"),
        ({"kind": "file", "text": "/etc/passwd"}, "is brought as"),
        (None, "is brought as"),
    ],
)
def test_what_cannot_be_brought(given: Any, said: str) -> None:
    assert said in tab.budget_bring(given)["error"]


def test_brought_architectures_are_bounded() -> None:
    from lab.architectures import from_table
    from lab.brought import Brought

    shelf = Brought(most=2)

    first = shelf.add(from_table("q 4 4"))
    for side in (5, 6):
        shelf.add(from_table(f"q {side} 4"))
    with pytest.raises(LabError, match="no longer has"):
        shelf.get(first)


def test_links_to_brought_architectures_outlive_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab import brought
    from lab.architectures import from_table, load
    from lab.brought import Brought

    home = tmp_path / "architectures"
    id = Brought(folder=home).add(from_table("q 64 32 times 3\nconv 8 4 3 3"))
    again = Brought(folder=home).get(id)
    assert [row.layer for row in again.rows] == [row.layer for row in from_table("q 64 32 times 3\nconv 8 4 3 3").rows]
    assert Brought(folder=home).get(Brought(folder=home).add(load("gpt2"))).rows == load("gpt2").rows
    monkeypatch.setattr(brought, "MOST_FILES", 2)
    Brought(folder=home).add(from_table("q 7 7"))
    assert len(list(home.glob("own-*.json"))) == 2
    for wrong in ("own-../../../etc/passwd", "own-zz", "own-0000000000000000"):
        with pytest.raises(LabError, match="no longer has"):
            Brought(folder=home).get(wrong)


# -- copies ------------------------------------------------------------------------------------------------
def test_csv_and_markdown_hold_the_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(budget_copy.copy(SMALL, "csv"))))
    assert [row["method"] for row in rows] == ["lora", "nora", "nola"]
    assert rows[0]["parameters"] == "73728"
    assert rows[0]["bytes_fp32"] == str(4 * 73728)
    assert "| LoRA | r = 2 | 73,728 |" in budget_copy.copy(SMALL, "markdown")
    with pytest.raises(LabError, match="is copied as one of"):
        budget_copy.copy(SMALL, "xls")


TINY = {
    "arch": "tiny-sdxl",
    "targets": ["q", "v"],
    "methods": {"lora": {"r": 3}, "nora": {"r_outer": 16, "r_inner": 2}},
}


def words(text: str) -> list[str]:
    return shlex.split(text.replace("\\\n", " "), comments=True)


def test_command_is_one_that_the_lab_takes() -> None:
    args = parser().parse_args(words(budget_copy.copy({**TINY, "te": True}, "command"))[3:])
    assert (args.command, args.method, args.targets, args.base) == ("subject", ["lora", "nora"], "q,v", "tiny-sdxl")
    assert {"lora.r=3", "nora.r_outer=16", "nora.r_inner=2"} <= set(args.set)
    assert args.text_encoder
    assert "blocks 1 to 2 alone" in budget_copy.copy({**TINY, "blocks": [1, 2]}, "command")


@pytest.mark.parametrize(
    "state",
    [
        {**SMALL, "blocks": [2, 5]},
        {"arch": "clip-vit-b16", "part": "vision", "targets": ["up"], "methods": {"lora": {}, "nola": {"k": 7}}},
        {"arch": "sd15-unet", "te": True, "targets": ["q", "conv"], "methods": {"lora": {"r": 2}}, "budget": 500_000},
    ],
)
def test_budget_commands_give_the_pages_counts(state: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = budget_report.report(state)["rows"]
    lines = budget_copy.copy(state, "command").splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert main([*words(line)[3:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["trainable_parameters"] == row["count"]


def test_command_trains_what_the_page_counts(tmp_path: Path) -> None:
    """The copied command, run as it stands but for the pictures, the word, and a training of one step."""
    text = budget_copy.copy(TINY, "command").replace("PICTURES", "assets/subjects/fox").replace("WORD", "fox")
    command = words(text.replace("out/compared", str(tmp_path)))[1:]
    short = ["--steps", "1", "--seeds", "0", "--sample-seeds", "0", "--sampling-steps", "1", "--prompt", "a {subject}"]
    done = subprocess.run(
        [sys.executable, *command, *short, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {run["method"]: run["trainable_parameters"] for run in json.loads(done.stdout)["runs"]}
    assert found == {row["id"]: row["count"] for row in budget_report.report(TINY)["rows"]}


def executed(state: dict[str, Any]) -> dict[str, Any]:
    """The configurations that the copied code makes, run as a visitor would run it."""
    made: dict[str, Any] = {}
    exec(budget_copy.copy(state, "peft"), made)  # our own text
    return made


@pytest.mark.parametrize("start", range(0, len(METHODS), budget_report.MAX_METHODS))
def test_peft_code_makes_the_adapters_that_the_page_counts(start: int) -> None:
    """Every method: its code is run, given to PEFT with a real model, and makes the parameters of the table."""
    import peft
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    chosen = METHODS.ids()[start : start + budget_report.MAX_METHODS]
    state = {"arch": "tiny-sdxl-te1", "targets": ["q", "out"], "methods": {id: {} for id in chosen}, "budget": 4000}
    rows = {row["id"]: row for row in budget_report.report(state)["rows"]}
    made = executed(state)
    config = CLIPTextConfig.from_dict(json.loads((ROOT / "assets/tiny-sdxl/text_encoder/config.json").read_text()))
    torch.manual_seed(0)
    for id in chosen:
        given = made[id.replace("-", "_")]
        if METHODS[id].needs or id in ("eva", "lora-ga"):  # their start needs a batch: the lab's own `attach`
            continue
        model = peft.get_peft_model(CLIPTextModel(config).requires_grad_(False), given)
        if id in ("lora-fa", "ffa-lora"):  # the code says so
            [p.requires_grad_(False) for name, p in model.named_parameters() if ".lora_A." in name]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == rows[id]["count"], id


@pytest.mark.parametrize(
    "change", [{"blocks": [1, 3]}, {"targets": ["conv", "down"]}, {"targets": ["q", "k", "v", "out", "up", "down"]}]
)
def test_peft_code_adapts_the_chosen_layers(change: dict[str, Any]) -> None:
    import peft
    import torch

    from lab import layer_tables
    from tests.architecture_configurations import configuration

    state = {**TINY, "methods": {"lora": {"r": 2}}, **change}
    with torch.device("meta"):
        model = peft.get_peft_model(layer_tables.build(configuration("tiny-sdxl")), executed(state)["lora"])
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == budget_report.report(state)["rows"][0]["count"]


def test_peft_code_says_what_it_cannot() -> None:
    assert "PEFT adapts whole" in budget_copy.copy(SMALL, "peft")
    assert "text encoder 2: the same with target_modules=" in budget_copy.copy({**TINY, "te": True}, "peft")


def test_target_modules_single_out_the_layers() -> None:
    from lab import architectures

    for id, targets, blocks in (
        ("sdxl-unet", "attn", None),
        ("sdxl-unet", "mlp", None),
        ("roberta-base", "out,down", None),
    ):
        arch = architectures.load(id)
        rows = [row.layer for row in arch.select(targets, blocks=blocks)]
        assert isinstance(budget_copy.target_modules(rows, [row.layer for row in arch.rows]), list)
    unet = architectures.load("sdxl-unet")
    chosen = [row.layer for row in unet.select("q", blocks=(1, 2))]
    assert isinstance(budget_copy.target_modules(chosen, [row.layer for row in unet.rows]), str)


def test_equations_and_the_papers_section() -> None:
    answer = tab.budget_equations({"L": 32, "q": 2, "n": 4096, "r": 16, "r_out": 2000, "r_in": 16})
    assert (answer["lora"], answer["nora"]) == (8_388_608, 4_096_000)
    assert "must be a whole number" in tab.budget_equations({"L": "x"})["error"]
    page = tab.calculator()
    assert page.count("<details><summary>NOLA, Table") == 10
    assert "8 of 8 counts agree" in page


@pytest.mark.parametrize("id", ["budget-curve", "budget-layers", "budget-files"])
def test_plots_draw_with_plotly_too(id: str) -> None:
    records = [
        {"method": "lora", "name": "LoRA", "knob": "r", "points": [[1, 10], [2, 20]], "chosen": [1, 10]}
        | {"blocks": ["block 0", "block 1"], "counts": [5, 5], "bytes": {"fp32": 40, "bf16": 20}}
    ]
    assert PLOTS[id].draw(records).data
    assert PLOTS[id].draw([]) is not None
