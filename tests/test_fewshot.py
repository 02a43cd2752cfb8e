"""What may be asked of the few-shot task, in a spec and on the command line."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lab import comparison
from lab.bases import BASES, Base
from lab.cli import main
from lab.cli.subject import progress
from lab.clip.method import Recipe
from lab.datasets import resolve
from lab.errors import LabError
from lab.methods.clip import CLIP_METHODS
from lab.tasks import fewshot as task_module
from lab.tasks.fewshot import PRESETS, recipe
from tests import micro_clip
from tests.fewshot_helpers import TASK, fewshot_home, spec  # noqa: F401 - fewshot_home is a fixture


# -- what may be asked ------------------------------------------------------------------------------------------------
def test_defaults_are_filled_in_and_checking_again_changes_nothing():
    made = TASK.check({})
    assert made["base"] == "tiny-clip"
    assert made["preset"] == "short"
    assert made["targets"] == "q,k,v"
    assert made["template"] == resolve("").template
    assert TASK.check(made) == made
    assert json.loads(json.dumps(made)) == made
    planned = TASK.plan(made)
    assert [p.seed for p in planned] == [1] * 3 + [2] * 3 + [3] * 3
    assert {p.method for p in planned} == set(made["methods"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"shotz": 4}, "Unknown setting 'shotz': did you mean shots"),
        ({"base": "tiny-sdxl"}, "makes pictures"),
        ({"base": "no/such"}, "Unknown model"),
        ({"dataset": "food"}, "Unknown dataset 'food': did you mean food101"),
        ({"methods": {"lorra": {}}}, "Unknown method 'lorra': did you mean lora"),
        ({"methods": {}}, "at least one method"),
        ({"methods": {"nora": {"r_inner": 0}}}, "r_inner must be at least 1"),
        ({"shots": [0]}, "shots must be whole numbers from 1 to 64, got 0"),
        ({"shots": []}, "at least one number of shots"),
        ({"shots": [24]}, "has 24 pictures to train with; 24 shots and at least one validation picture need 25"),
        ({"seeds": ["x"]}, "seeds must be whole numbers"),
        ({"template": "a photo"}, "must have {} where the class belongs"),
        ({"classes": ["a", "b"]}, "has 12 classes, 2 names were given"),
        ({"classes": ["a"] * 12}, "Two classes are called 'a'"),
        ({"encoder": "audio"}, "vision, text or both"),
        ({"preset": "long"}, "Unknown preset"),
        ({"targets": "q,zz"}, "Unknown target 'zz'"),
        ({"lr": {"lora": -1}}, "above 0"),
        ({"crop": [0.5, 2]}, "share of the area"),
        ({"also": "digits"}, "must be a list"),
        ({"also": ["digitz"]}, "Unknown dataset 'digitz': did you mean digits"),
        (
            {"also": ["digits"], "shots": [20], "dataset": "openmoji", "seeds": [1], "classes": ["x"]},
            "12 classes, 1 names",
        ),
        ({"base": "timm:vit_base_patch16_224.augreg_in21k", "methods": ["coop-4"]}, "cannot read: leave it out"),
    ],
)
def test_bad_values_are_one_sentence(given, sentence):
    with pytest.raises(LabError) as refused:
        TASK.check(given)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_presets_are_what_the_papers_say():
    made = TASK.check({"preset": "clip-lora", "methods": ["lora", "clip-lora", "coop-16"], "base": "ViT-B-16:openai"})
    assert recipe(made, "lora") == Recipe((2e-4,), steps_per_shot=500, batch=32, weight_decay=0.01)
    assert recipe(made, "lora").length(4, 400) == 2000
    assert made["methods"]["lora"]["r"] == 2
    assert made["methods"]["clip-lora"] == {"r": 2, "alpha": 1.0, "dropout": 0.25}
    assert recipe(made, "coop-16") == CLIP_METHODS["coop-16"].published
    assert PRESETS["clip-lora"].crop == (0.08, 1.0)
    nora = TASK.check({"preset": "nora", "methods": ["nora"], "shots": [4]})
    assert recipe(nora, "nora").rates == (1e-3, 5e-3, 1e-2)
    assert nora["methods"]["nora"]["r_inner"] == 16
    assert recipe(TASK.check({"methods": ["lora"], "lr": {"lora": 0.5}}), "lora").rates == (0.5,)


def test_published_recipes_are_the_official_codes():
    """Epochs by shots, batch and rate as the configurations and scripts of each repository have them."""
    said = {
        "coop-16": (2e-3, "sgd", 32, (50, 100, 200)),
        "cocoop": (2e-3, "sgd", 1, (10, 10, 10)),
        "kgcoop": (2e-3, "sgd", 128, (100, 100, 100)),
        "prograd": (2e-3, "sgd", 32, (50, 100, 200)),
        "taskres": (2e-3, "adam", 256, (100, 100, 200)),
        "plotpp": (2e-3, "sgd", 32, (100, 200, 400)),  # two stages
        "tip-adapter-f": (1e-3, "adamw", 256, (20, 20, 20)),
        "clip-lora": (2e-4, "adamw", 32, None),
    }
    for id, (rate, optimizer, batch, epochs) in said.items():
        made = CLIP_METHODS[id].published
        assert (made.rates, made.optimizer, made.batch) == ((rate,), optimizer, batch), id
        for shots, count in zip((1, 4, 16), epochs or (), strict=False):
            examples = 100 * shots
            assert made.length(shots, examples) == count * -(-examples // batch), (id, shots)
            assert made.warmup_steps(examples) == (0 if id == "tip-adapter-f" else -(-examples // batch)), id
    assert CLIP_METHODS["clip-lora"].published.length(16, 1600) == 8000
    assert CLIP_METHODS["full"].published.rates == (8e-5, 5e-5, 3e-5, 1e-5)


def test_image_models_are_trained_as_nola_trains_them():
    base = "timm:vit_base_patch16_224.augreg_in21k"
    made = TASK.check({"base": base, "methods": ["1-nn", "linear", "full", "lora", "nola"], "shots": [5, 10]})
    assert made["preset"] == "nola"
    assert TASK.check({"base": "timm:vit_tiny_patch16_224:random", "methods": ["lora"]})["preset"] == "nola"
    assert recipe(made, "nola") == Recipe((5e-3, 1e-3, 5e-4), epochs=50, batch=64)
    assert made["methods"]["nola"]["k"] == made["methods"]["nola"]["l"] == 1000
    assert made["methods"]["lora"]["r"] == 4


# -- the command line --------------------------------------------------------------------------------------------------
def test_command_line_on_a_folder_with_the_embedded_model(tmp_path, capsys):
    for c, (name, colour) in enumerate(zip(micro_clip.CLASSES, micro_clip.COLOURS, strict=True)):
        for i in range(6):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (24, 24), colour)
            image.putpixel((i, c), (0, 0, 0))
            image.save(path)
    out = tmp_path / "out"
    words = [
        "fewshot",
        str(tmp_path / "data"),
        "--method",
        "zero-shot",
        "--method",
        "nora",
        "--shots",
        "1,2",
        "--seeds",
        "1",
    ]
    words += ["--steps", "2", "--batch", "3", "--set", "nora.r_inner=2", "--out", str(out), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out)
    assert [(r["method"], r["seed"], r["shots"]) for r in told["runs"]] == [
        ("zero-shot", 1, 1), ("zero-shot", 1, 2), ("nora", 1, 1), ("nora", 1, 2),
    ]  # fmt: skip
    assert all(0 <= r["accuracy"] <= 1 and r["train_seconds"] >= 0 for r in told["runs"])
    assert told["runs"][0]["trainable_parameters"] == 0
    assert told["runs"][2]["trainable_parameters"] > 0
    assert (out / "runs" / "nora-s1" / "shots-1" / "adapter" / "adapter_config.json").exists()
    assert (out / "table.md").read_text() == told["table"]
    assert main(words) == 0  # goes on where it stopped: nothing is left to do
    assert json.loads(capsys.readouterr().out)["runs"] == told["runs"]
    assert main([*words[:-1], "--seeds", "2"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_runs_in_processes_of_their_own_are_the_same_runs(tmp_path, capsys):
    """The task here fails before it imports torch: what is tested is who runs where, and that a failure is told."""
    made = spec(methods=["zero-shot", "taskres"], shots=[1]) | {"base": "no-such-model"}
    done = tmp_path / "two" / "runs" / "taskres-s1" / "result.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    runs = comparison.run_all(tmp_path / "two", "fewshot", made, progress, processes=2)
    assert [(r["method"], r["state"]) for r in runs] == [("zero-shot", "failed"), ("taskres", "done")]
    assert "no-such-model" in runs[0]["message"]
    assert main(["fewshot", "--processes", "0", "--out", str(tmp_path / "x")]) == 2
    assert "--processes must be between 1 and 64" in capsys.readouterr().err


def test_command_line_lists_and_refuses(capsys, tmp_path):
    assert main(["fewshot", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"openmoji", "digits", "food101"} <= {d["id"] for d in listed["datasets"]}
    assert len(listed["methods"]) >= 20
    assert main(["fewshot", "--method", "lora"]) == 2
    assert main(["fewshot", "nothing", "--out", str(tmp_path / "o")]) == 2
    assert "Unknown dataset" in capsys.readouterr().err


def test_base_rows_need_no_torch_and_name_their_size():
    assert isinstance(BASES["tiny-clip"], Base)
    assert BASES["tiny-clip"].resolution > 0
    assert task_module.name("coop-16") == "CoOp (16 tokens)"
