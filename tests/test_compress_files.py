"""Compressing adapter files from the command line, and updates of text encoders."""

from __future__ import annotations

import json

import pytest
import torch

from lab.cli import main
from lab.compress import compress
from tests.compress_helpers import fox_file, low_rank  # noqa: F401 - fox_file is a fixture

pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


def test_command_line_compresses_a_file_and_exports_the_result(fox, tmp_path, capsys):
    from lab.export import export

    assert (
        main(["compress", fox, "--method", "nora", "--budget", "600", "--out", str(tmp_path / "small"), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == "tiny-sdxl"
    assert found["original"]["parameters"] > 2 * found["parameters"]
    assert found["original"]["bytes"] > 0
    assert 0 < found["relative_error"] < 1
    assert json.loads((tmp_path / "small" / "report.json").read_text()) == found
    assert export(tmp_path / "small", "diffusers", tmp_path / "out")["relative_error"] < 1e-6
    assert main(["compress", fox, "--method", "nora", "--budget", "600", "--out", str(tmp_path / "small")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_command_line_draws_before_and_after(fox, tmp_path, capsys):
    from PIL import Image

    words = ["--prompt", "a fox", "--seeds", "3", "--set", "r=2", "--out", str(tmp_path / "same")]
    assert main(["compress", fox, "--method", "lora", *words]) == 0
    assert "relative error" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "same" / "pictures.png").convert("RGB")
    base, before, after = (sheet.crop((8 + i * 208, 86, 200 + i * 208, 278)) for i in range(3))
    assert before.tobytes() != base.tobytes()
    apart = torch.frombuffer(bytearray(before.tobytes()), dtype=torch.uint8).int()
    apart -= torch.frombuffer(bytearray(after.tobytes()), dtype=torch.uint8).int()
    assert apart.abs().float().mean() < 0.5  # the same update in another file, but for rounding in 25 steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "nora"], "how small"),
        (["--method", "dora", "--budget", "100"], "dora"),
        (["--method", "lora", "--budget", "many"], "number"),
        (["--method", "nora", "--budget", "900", "--base", "tiny-clip"], "CLIP"),
    ],
)
def test_command_line_bad_input(fox, words, said, tmp_path, capsys):
    assert main(["compress", fox, *words, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_text_encoders_are_compressed_too(small_sdxl, tmp_path):
    from lab.compress._files import network

    names = [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ]
    sides = [32, 64]
    goals = {name: low_rank(d, d, 3, i) for i, (name, d) in enumerate(zip(names, sides, strict=True))}
    whole = network(small_sdxl, goals)
    found = compress(whole, goals, "nora", 400, tmp_path)
    assert [r["layer"] for r in found["layers"]] == names
    assert all(r["relative_error"] < 1 for r in found["layers"])
