"""Tables, verdicts, grids and reports, on results written by hand."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab import compare, images
from lab.tasks import TASKS

COLOURS = {"base": (90, 90, 90), "lora": (200, 120, 40), "nora": (20, 150, 140)}


def result(clip_i: float, parameters: int | None = None, **more: Any) -> dict[str, Any]:
    scores = {"clip_i": clip_i, "clip_t": 0.25, "sample_seconds": 2.0}
    if parameters is None:
        return scores
    return (
        scores
        | {
            "knobs": {"r": 4},
            "lr": 1e-3,
            "trainable_parameters": parameters,
            "adapter_bytes": 4 * parameters,
            "train_seconds": 10.0,
            "peak_memory_bytes": 10**9,
            "drift": 0.1,
        }
        | more
    )


def run(method: str, seed: int, folder: Path, found: dict[str, Any] | None) -> dict[str, Any]:
    state = "done" if found else "failed"
    return {
        "method": method,
        "seed": seed,
        "knobs": {},
        "state": state,
        "message": "",
        "folder": str(folder),
        "result": found,
    }


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """A comparison's folder as a finished one looks: three pictures, two prompts, LoRA and NoRA at two seeds."""
    spec = TASKS["subject"].check(
        {"class_word": "fox <b>", "captions": ["one", "", "a&b"], "prompts": ["a {subject} in the snow", "a {subject}"]}
    )
    (tmp_path / "inputs").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (i * 80, 0, 0)).save(tmp_path / "inputs" / f"{i:03d}.png")
    found = [
        ("base", 0, result(-0.2)),
        ("lora", 0, result(0.2, 1000)),
        ("nora", 0, result(0.30, 250, train_seconds=20.0)),
        ("lora", 1, result(0.3, 1000)),
        ("nora", 1, result(0.34, 250, train_seconds=30.0)),
    ]
    runs = []
    for method, seed, scores in found:
        folder = tmp_path / "runs" / f"{method}-s{seed}"
        (folder / "samples").mkdir(parents=True)
        for p in range(2):
            for s in spec["sample_seeds"]:
                Image.new("RGB", (16, 16), COLOURS[method]).save(folder / "samples" / f"p{p}_s{s}.png")
        lines = [{"step": i + 1, "loss": 1 / (i + 1), "t": i} for i in range(5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(run(method, seed, folder, scores))
    return tmp_path, spec, runs


def test_table_by_hand(finished: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    base, lora, nora = compare.table(finished[2])
    assert (base["method"], base["name"], base["runs"]) == ("base", "Base model", 1)
    assert base["trainable_parameters"] is base["clip_i_spread"] is base["gain"] is None
    assert (lora["name"], lora["runs"], lora["seeds"]) == ("LoRA", 2, [0, 1])
    assert lora["clip_i"] == pytest.approx(0.25)
    assert lora["clip_i_spread"] == pytest.approx(0.1 / 2**0.5)  # of two values: their distance over √2
    assert lora["gain"] == pytest.approx(0.45)
    assert (nora["trainable_parameters"], nora["adapter_bytes"]) == (250, 1000)
    assert nora["train_seconds"] == pytest.approx(25.0)
    assert nora["size_ratio"] == pytest.approx(0.25)


def test_no_winner_is_declared_inside_the_spread(finished: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    rows = compare.table(finished[2])
    said = compare.verdicts(rows)
    assert "LoRA: CLIP-I +0.450 over the base model, more than the spread over seeds (0.071)." in said
    assert "NoRA and LoRA differ by 0.070, inside the spread (0.076): no winner." in said
    assert "NoRA trains 25% of LoRA's parameters." in said
    rows[2]["clip_i"] = 0.40
    assert "NoRA is 0.150 above LoRA, beyond the spread (0.076)." in compare.verdicts(rows)
    rows[1]["gain"] = 0.05
    assert any("within the spread over seeds (0.071): no gain shown" in s for s in compare.verdicts(rows))
    single = compare.table([r for r in finished[2] if r["seed"] == 0])
    assert any("one training seed tells nothing" in s for s in compare.verdicts(single))


def test_runs_that_failed_or_have_no_scores_leave_gaps_not_errors(
    finished: tuple[Path, dict[str, Any], list[dict[str, Any]]],
) -> None:
    folder, spec, runs = finished
    broken = [run("base", 0, folder, None), *runs[1:3], run("lora", 1, folder, None)]
    broken[1] = broken[1] | {"result": broken[1]["result"] | {"clip_i": None, "clip_t": None, "drift": None}}
    lora, nora = compare.table(broken)
    assert (lora["method"], lora["clip_i"], lora["gain"], nora["clip_i_spread"]) == ("lora", None, None, None)
    assert len(compare.write_report(folder, spec, broken)) == 3
    assert compare.write_report(folder, spec, [run("base", 0, folder, None)]) == []


def test_grid_shows_every_picture_in_its_place(finished: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    folder, spec, runs = finished
    sheet = compare.grid(folder, spec, runs, side=64)
    side = 64
    for colour in COLOURS.values():  # two prompts × two sample seeds of each method, at nearest-neighbour sharpness
        count = sum(n for n, c in sheet.getcolors(2**24) or [] if c == colour)
        assert count >= 2 * 2 * side * side
    first = {m: _first_column(sheet, c) for m, c in COLOURS.items()}
    assert first["base"] < first["lora"] < first["nora"]


def _first_column(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return min(x for x in range(sheet.width) for y in range(0, sheet.height, 16) if sheet.getpixel((x, y)) == colour)


def test_small_pictures_stay_sharp() -> None:
    picture = Image.new("RGB", (2, 1), "black")
    picture.putpixel((1, 0), (255, 255, 255))
    big = images.enlarged(picture, 64)
    assert big.size == (64, 32)
    assert {c for _, c in big.getcolors() or []} == {(0, 0, 0), (255, 255, 255)}


def test_csv_has_methods_then_runs(finished: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    rows = list(csv.DictReader(io.StringIO(compare.results_csv(finished[2]))))
    assert [r["method"] for r in rows if r["scope"] == "method"] == ["base", "lora", "nora"]
    assert [(r["method"], r["seeds"]) for r in rows if r["scope"] == "run"] == [
        ("base", "0"), ("lora", "0"), ("nora", "0"), ("lora", "1"), ("nora", "1"),
    ]  # fmt: skip
    assert float(rows[1]["clip_i"]) == pytest.approx(0.25)


def test_report_is_whole_escaped_and_fetches_nothing(
    finished: tuple[Path, dict[str, Any], list[dict[str, Any]]],
) -> None:
    folder, spec, runs = finished
    made = compare.write_report(folder, spec, runs)
    assert [p.name for p in made] == ["grid.png", "results.csv", "report.html"]
    page = made[2].read_text()
    assert "fox &lt;b&gt;" in page
    assert "<b>" not in page
    assert "a&amp;b" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "url(" not in page
    assert page.count("data:image/png") == 3 + 2 * 2 * 5  # the subject's, then prompts × sample seeds × runs
    assert page.count("<polyline") == 4
    with Image.open(made[0]) as sheet:
        assert sheet.size[0] > 300


def test_comparing_imports_no_torch() -> None:
    code = "import sys, lab.compare, lab.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
