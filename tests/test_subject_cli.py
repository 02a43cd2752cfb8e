"""`python -m lab subject`: what it prints, writes, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.cli import main
from tests import small_sdxl as small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with two captions beside them."""
    path = tmp_path / "pictures"
    path.mkdir()
    for i, picture in enumerate(small.pictures(3)):
        picture.save(path / f"{i}.jpg")
    (path / "0.txt").write_text("a fox in the snow\n")
    (path / "2.txt").write_text("a fox asleep\n")
    return path


FAST = [
    "--steps",
    "1",
    "--batch",
    "1",
    "--sampling-steps",
    "1",
    "--preview-every",
    "0",
    "--seeds",
    "3",
    "--sample-seeds",
    "0",
]


def test_json_alone_on_standard_output_and_everything_in_the_folder(
    small_sdxl: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["subject", str(folder), "--class-word", "fox", "--base", "small-sdxl", "--out", str(out), "--json", *FAST]
    words += [
        "--method",
        "lora",
        "--method",
        "nora",
        "--set",
        "nora.r_inner=1",
        "--lr",
        "lora=0.001",
        "--prompt",
        "a {subject}",
    ]
    assert main(words) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["out"] == str(out)
    assert set(told["base"]) == {"clip_i", "clip_t"}
    assert [(r["method"], r["seed"], r["state"]) for r in told["runs"]] == [("lora", 3, "done"), ("nora", 3, "done")]
    for run in told["runs"]:
        assert run["trainable_parameters"] > 0
        assert run["adapter_bytes"] > 0
        assert (Path(run["adapter"]) / "adapter_config.json").exists()
        assert str(tmp_path) not in (Path(run["adapter"]) / "adapter_config.json").read_text()
        assert {"train_seconds", "peak_memory_bytes", "clip_i", "clip_t"} <= set(run)
    assert told["runs"][1]["knobs"]["r_inner"] == 1
    assert {p.name for p in out.iterdir()} >= {"spec.json", "inputs", "runs", "grid.png", "results.csv", "report.html"}
    spec = json.loads((out / "spec.json").read_text())
    assert spec["captions"] == ["a fox in the snow", "", "a fox asleep"]
    assert spec["lr"]["lora"] == 0.001
    assert "lora seed 3: training" in printed.err

    assert main(words) == 0  # again: nothing is left to do
    again = capsys.readouterr()
    assert json.loads(again.out) == told
    assert "training" not in again.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "The class word is empty"),
        (["--class-word", "fox", "--steps", "0"], "steps must be between 1"),
        (["--class-word", "fox", "--method", "lara"], "Unknown method 'lara': did you mean"),
        (["--class-word", "fox", "--set", "nora.r_inner"], "--set takes"),
        (["--class-word", "fox", "--method", "lora", "--set", "nora.r_inner=2"], "add --method nora"),
        (["--class-word", "fox", "--lr", "fast"], "--lr takes a number"),
        (["--class-word", "fox", "--seeds", "a"], "--seeds takes whole numbers"),
        (["--class-word", "fox", "--caption", "one"], "got 1 for 3 pictures"),
        (["--class-word", "fox", "--base", "x.ckpt"], "pickled checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_two(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["subject", str(folder), "--out", str(tmp_path / "out"), *words]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_missing_or_too_few(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--class-word", "fox", "--out", str(tmp_path / "out")]
    assert main(["subject", str(tmp_path / "nowhere"), *rest]) == 2
    assert "There is no file or folder" in capsys.readouterr().err
    assert main(["subject", str(folder / "0.jpg"), *rest]) == 2
    assert "Between 3 and 20 pictures" in capsys.readouterr().err
    (folder / "1.jpg").write_text("not a picture")
    assert main(["subject", str(folder), *rest]) == 2
    assert "1.jpg" in capsys.readouterr().err


def test_an_adapter_beside_the_methods(
    small_sdxl: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["subject", str(folder), "--class-word", "fox", "--base", "small-sdxl", *FAST, "--prompt", "a {subject}"]
    assert main([*words, "--method", "lora", "--out", str(tmp_path / "first")]) == 0
    adapter = tmp_path / "first" / "runs" / "lora-s3" / "adapter"
    capsys.readouterr()
    assert main([*words, "--adapter", str(adapter), "--out", str(tmp_path / "second"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["method"], run["state"], run["train_seconds"]) == ("lora-s3", "done", None)
    assert run["trainable_parameters"] > 0
    assert main([*words, "--adapter", str(adapter), "--out", str(tmp_path / "second")]) == 0  # as a table, all done
    assert "lora-s3" in capsys.readouterr().out
    assert main([*words, "--adapter", "old.ckpt", "--out", str(tmp_path / "third")]) == 2
    assert "There is no adapter 'old.ckpt'" in capsys.readouterr().err
