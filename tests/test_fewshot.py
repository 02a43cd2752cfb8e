"""The few-shot task from spec to table: what may be asked, what a run does and leaves, and what the table claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lab import comparison
from lab.bases import BASES, Base
from lab.cli import main
from lab.cli.subject import progress
from lab.clip import fit as fitting
from lab.clip import table
from lab.clip.method import Recipe
from lab.clip.pictures import TestSet, augment, prepare
from lab.clip.scores import score
from lab.datasets import Listing, Picture, resolve
from lab.errors import LabError
from lab.methods.clip import CLIP_METHODS
from lab.tasks import TASKS, Cancelled, PlannedRun, _fewshot_run
from lab.tasks import fewshot as task_module
from lab.tasks.fewshot import PRESETS, recipe
from tests import micro_clip

TASK = TASKS["fewshot"]
SMALL = {"steps": 4, "batch": 6, "shots": [1, 2], "seeds": [1]}


def silent(*_args, **_values):
    pass


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    for cached in (_fewshot_run.pictures, _fewshot_run.model, _fewshot_run._episode):
        cached.cache_clear()


@pytest.fixture
def micro(monkeypatch, tmp_path):
    """The task on a narrow random model and coloured squares: fast enough to run whole. Opened files are recorded."""
    opened: list[str] = []
    pixels = {i: micro_clip.squares([i // 10], seed=i)[0] for i in range(30)}

    def read(key: str) -> Image.Image:
        opened.append(key)
        return Image.fromarray(pixels[int(key.split("-")[1])].permute(1, 2, 0).numpy())

    parts = {
        name: [Picture(f"{name}-{c * 10 + i}", c) for c in range(3) for i in span]
        for name, span in (("train", range(6)), ("test", range(6, 10)))
    }
    listing = Listing(list(micro_clip.CLASSES), parts["train"], parts["test"], read)
    monkeypatch.setattr(_fewshot_run, "model", lambda _base: micro_clip.clip())
    monkeypatch.setattr(_fewshot_run, "pictures", lambda _dataset: listing)
    return opened


def spec(**given) -> dict:
    """A spec of the micro task; what it says of classes fits the squares."""
    return TASK.check(SMALL | given) | {"classes": list(micro_clip.CLASSES), "template": "a {}"}


def run(made: dict, folder: Path, planned: PlannedRun | None = None, report=silent) -> dict:
    return TASK.run(made, planned or TASK.plan(made)[0], folder, folder, report)


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


# -- what a run does ---------------------------------------------------------------------------------------------------
def test_run_leaves_results_that_hold_together(micro, tmp_path):
    made = spec(methods=["taskres"])
    steps = []
    result = run(made, tmp_path / "a", report=lambda step, steps_, **v: steps.append((step, steps_, v["phase"])))
    assert [part["shots"] for part in result["shots"]] == [1, 2]
    for part in result["shots"]:
        assert part["train_pictures"] == 3 * part["shots"]
        assert part["test_pictures"] == 12
        confusion = torch.tensor(part["confusion"])
        assert confusion.sum() == 12
        assert confusion.diagonal().sum() / 12 == pytest.approx(part["accuracy"])
        assert part["per_class_count"] == [4, 4, 4]
        assert part["trainable_parameters"] == 3 * 24
        assert part["steps"] == 4
        assert 0 <= part["best_step"] <= 4
        assert part["peak_memory_bytes"] > 0
    assert result["accuracy"] == {"1": result["shots"][0]["accuracy"], "2": result["shots"][1]["accuracy"]}
    assert steps[-1][0] == steps[-1][1]
    assert [s for s, *_ in steps] == sorted(s for s, *_ in steps)
    curve = [json.loads(line) for line in (tmp_path / "a" / "validation.jsonl").read_text().splitlines()]
    assert {c["shots"] for c in curve} == {1, 2}
    assert {"step", "accuracy", "loss", "rate"} <= set(curve[0])
    assert (tmp_path / "a" / "meta.json").exists()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("id", ["lora", "linear", "tip-adapter-f", "full"])
def test_same_seed_same_result_and_trained_classifier_comes_back(micro, tmp_path, id):
    made = spec(methods=[id], shots=[2])
    first = run(made, tmp_path / "a")
    _fewshot_run._episode.cache_clear()
    second = run(made, tmp_path / "b")
    assert first["shots"][0]["confusion"] == second["shots"][0]["confusion"]
    states = [(tmp_path / name / "shots-2" / "state.safetensors").read_bytes() for name in ("a", "b")]
    assert states[0] == states[1]
    planned = TASK.plan(made)[0]
    trained, head = _fewshot_run.build(made, planned, 2, tmp_path / "a")
    held_out = TestSet(head["clip"], _fewshot_run.pictures(""), None)
    again = score(fitting.test(trained, head, held_out), held_out.labels, [""] * 12)
    assert again["confusion"] == first["shots"][0]["confusion"]
    with pytest.raises(LabError, match="has not finished 8 shots"):
        _fewshot_run.build(made, planned, 8, tmp_path / "a")


@pytest.mark.parametrize("id", ["lora", "taskres", "linear", "tip-adapter"])
def test_no_test_picture_is_opened_before_everything_is_settled(micro, tmp_path, monkeypatch, id):
    """Training, validation and the search of hyper-parameters see other pictures; testing opens each test picture once."""
    seen: list[str] = []
    fit = fitting.fit

    def watched(*args, **values):
        fitted = fit(*args, **values)
        seen.extend(micro)
        micro.clear()
        return fitted

    monkeypatch.setattr(fitting, "fit", watched)
    _fewshot_run._episode.cache_clear()
    run(spec(methods=[id], shots=[2]), tmp_path / "a")
    assert seen
    assert not any(key.startswith("test") for key in seen)
    assert len(seen) == len(set(seen))  # shots and validation pictures are different pictures
    assert sorted(micro) == sorted(f"test-{c * 10 + i}" for c in range(3) for i in range(6, 10))


def test_second_look_at_the_test_set_is_a_fault(micro):
    method, episode = CLIP_METHODS["zero-shot"], micro_clip.episode()
    head = method.build(episode, method.knobs())
    held_out = TestSet(episode.clip, _fewshot_run.pictures(""), None)
    fitting.test(method, head, held_out)
    with pytest.raises(RuntimeError, match="looked at twice"):
        fitting.test(method, head, held_out)
    assert not hasattr(episode, "test")


def test_methods_leave_the_shared_draw_as_they_found_it(micro, tmp_path):
    """A method's result does not depend on which methods ran before it in the same process."""
    made = spec(methods=["taskres", "lora", "full", "tip-adapter-f"], shots=[2])
    alone = run(made, tmp_path / "alone", TASK.plan(made)[0])
    for planned in TASK.plan(made):
        run(made, tmp_path / planned.method, planned)
    after = run(made, tmp_path / "after", TASK.plan(made)[0])
    assert _fewshot_run._episode.cache_info().hits > 0
    assert after["shots"][0]["confusion"] == alone["shots"][0]["confusion"]
    states = [(tmp_path / name / "shots-2" / "state.safetensors").read_bytes() for name in ("alone", "after")]
    assert states[0] == states[1]


def test_frozen_features_of_the_test_set_are_computed_once(micro, tmp_path):
    made = spec(methods=["zero-shot", "taskres"])
    first, second = TASK.plan(made)
    run(made, tmp_path / "a", first)
    micro.clear()
    run(made, tmp_path / "b", second)
    assert not any(key.startswith("test") for key in micro)


def test_interrupted_run_goes_on_and_ends_where_it_would_have(micro, tmp_path):
    made = spec(methods=["coop-4"], steps=120, shots=[1, 2])
    whole = run(made, tmp_path / "whole")

    def stop(step, steps, **_values):
        if step > 1 and step == 3 * steps // 4:  # in the middle of the second number of shots
            raise Cancelled

    with pytest.raises(Cancelled):
        run(made, tmp_path / "cut", report=stop)
    assert (tmp_path / "cut" / "shots-1" / "result.json").exists()
    assert list((tmp_path / "cut" / "shots-2").glob("rate-0/checkpoint/*"))
    before = (tmp_path / "cut" / "shots-1" / "result.json").stat().st_mtime_ns
    resumed = run(made, tmp_path / "cut")
    assert (tmp_path / "cut" / "shots-1" / "result.json").stat().st_mtime_ns == before
    assert resumed["accuracy"] == whole["accuracy"]
    states = [(tmp_path / name / "shots-2" / "state.safetensors").read_bytes() for name in ("whole", "cut")]
    assert states[0] == states[1]


def test_validation_chooses_among_learning_rates(micro, tmp_path):
    made = spec(methods=["taskres"], shots=[2], lr=[1e-9, 0.05])
    part = run(made, tmp_path / "a")["shots"][0]
    curve = [json.loads(line) for line in (tmp_path / "a" / "validation.jsonl").read_text().splitlines()]
    best = max(curve, key=lambda c: (c["accuracy"], -c["loss"]))
    assert (part["lr"], part["best_step"]) == (best["rate"], best["step"])
    assert part["validation_accuracy"] == pytest.approx(best["accuracy"])


def test_several_datasets_make_one_run_with_places_of_their_own(micro, tmp_path):
    """The second dataset is read, trained and tested as the first, and a classifier comes back from either."""
    made = spec(methods=["taskres"], shots=[1]) | {"also": ["digits"]}
    steps = []
    result = run(made, tmp_path / "a", report=lambda step, _steps, **v: steps.append((step, v["phase"])))
    assert [part["dataset"] for part in result["shots"]] == ["openmoji", "digits"]
    assert result["datasets"] == ["openmoji", "digits"]
    assert [s for s, _ in steps] == sorted(s for s, _ in steps)
    assert any(phase.startswith("Handwritten digits (embedded), 1 shots: ") for _, phase in steps)
    assert (tmp_path / "a" / "also-1" / "shots-1" / "state.safetensors").exists()
    curve = [json.loads(line) for line in (tmp_path / "a" / "validation.jsonl").read_text().splitlines()]
    assert {line["dataset"] for line in curve} == {"openmoji", "digits"}
    own, place = task_module.parts(made, tmp_path / "a")[1]
    assert own["template"] == resolve("digits").template
    assert own["classes"] is None
    _, head = _fewshot_run.build(own, TASK.plan(made)[0], 1, place)
    assert head["residual"].abs().sum() > 0
    found = table.records([{"result": result}])
    assert table.columns(found) == [("openmoji", 1), ("digits", 1), (table.AVERAGE, 1)]
    mean = table.rows(found)[0]["cells"][(table.AVERAGE, 1)]["mean"]
    assert mean == pytest.approx(sum(part["accuracy"] for part in result["shots"]) / 2)
    assert "average, 1 shots" in table.markdown(found)


def test_image_model_without_texts_gets_a_linear_head(monkeypatch, tmp_path):
    """NOLA's vision protocol on a timm model: 1-NN, linear, full fine-tuning, LoRA, NOLA on q and v, or on the MLP."""
    import timm

    from lab.clip.model import Clip
    from lab.clip.split import split_attention

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=16, patch_size=8, depth=2)
    split_attention(vit.eval().requires_grad_(False))
    made = Clip(vit, "vit", 16, (0.5,) * 3, (0.5,) * 3)
    for id, targets in (
        ("1-nn", "q,v"),
        ("linear", "q,v"),
        ("full", "q,v"),
        ("lora", "q,v"),
        ("nola", "q,v"),
        ("nola", "mlp"),
    ):
        episode = micro_clip.episode(made, shots=2, targets=targets)
        method = _fewshot_run.runner(id)
        fitted = fitting.fit(
            method,
            episode,
            method.knobs(),
            Recipe((1e-3,), steps=3, batch=6),
            tmp_path / f"{id}{targets}",
            silent,
            silent,
        )
        logits = fitting.predict_examples(method, fitted.head, episode.validation)
        assert logits.shape == (6, 3)
        if id in ("lora", "nola"):
            names = {n for n, p in fitted.head.named_parameters() if p.requires_grad}
            assert {"trained.linear", "trained.bias"} < names
            assert any((".mlp." in n) == (targets == "mlp") for n in names if "blocks" in n)


# -- pictures and scores --------------------------------------------------------------------------------------------------
def test_prepare_is_open_clips_own_transform():
    import open_clip

    made = micro_clip.clip()
    wide = Image.effect_noise((50, 31), 90).convert("RGB")
    for squash in (False, True):
        made.squash = squash
        own = open_clip.image_transform(16, False, (0,) * 3, (1,) * 3, resize_mode="squash" if squash else "shortest")
        expected = (own(wide) * 255).round().to(torch.uint8)
        assert torch.equal(prepare(wide, made), expected)


def test_crops_stay_inside_and_cover_the_area_asked_for():
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32).contiguous()
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(augment(ramp, generator, (1.0, 1.0), False), ramp, atol=1e-5, rtol=0)
    cut = augment(ramp, torch.Generator().manual_seed(0), (0.25, 0.25), True)
    widths = (cut[:, 0, 0, -1] - cut[:, 0, 0, 0]).abs()
    assert widths.min() > 0.5 * 0.85 - 0.1
    assert widths.max() < 0.5 * 1.16 + 0.05
    assert (cut[:, 0, 0, -1] < cut[:, 0, 0, 0]).float().mean() == pytest.approx(0.5, abs=0.25)
    assert not torch.equal(cut, augment(ramp, generator, (0.25, 0.25), True))


def test_scores_by_hand():
    logits = torch.tensor([[4.0, 0, 0], [3.0, 0, 0], [0, 2.0, 0], [0, 0, 9.0]])
    made = score(logits, torch.tensor([0, 1, 1, 1]), ["a", "b", "c", "d"])
    assert made["accuracy"] == 0.5
    assert made["per_class"] == [1.0, pytest.approx(1 / 3), None]
    assert made["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert [w["picture"] for w in made["wrong"]] == ["d", "b"]
    assert made["wrong"][0] | {"confidence": 0, "truth_probability": 0} == {
        "picture": "d", "truth": 1, "predicted": 2, "confidence": 0, "truth_probability": 0,
    }  # fmt: skip
    assert {(c["truth"], c["predicted"], c["count"]) for c in made["confused"]} == {(1, 0, 1), (1, 2, 1)}


def test_scores_of_five_thousand_classes_stay_small():
    labels = torch.arange(5000)
    made = score(torch.eye(5000).roll(1, 1), labels, ["x"] * 5000)
    assert made["confusion"] is None
    assert len(made["confused"]) == 30
    assert len(json.dumps(made)) < 200_000


# -- the table ----------------------------------------------------------------------------------------------------------
def results(method: str, accuracies: list[float], shots: int = 4) -> list[dict]:
    part = {"shots": shots, "trainable_parameters": 10, "train_seconds": 1.0, "peak_memory_bytes": 5}
    return [
        {"result": {"method": method, "seed": seed, "dataset": "d", "shots": [part | {"accuracy": a}]}}
        for seed, a in enumerate(accuracies)
    ]


def test_best_is_bold_only_outside_the_noise():
    clear = results("lora", [0.80, 0.81, 0.82]) + results("nora", [0.70, 0.71, 0.69]) + results("zero-shot", [0.5] * 3)
    text = table.markdown(table.records(clear))
    assert "**81.0 ± 1.0**" in text
    assert "<u>70.0 ± 1.0</u>" in text
    near = results("lora", [0.80, 0.70, 0.90]) + results("nora", [0.79, 0.72, 0.88])
    assert "**" not in table.markdown(table.records(near))
    one = results("lora", [0.9]) + results("nora", [0.1])
    assert "**" not in table.markdown(table.records(one))


@pytest.mark.parametrize(
    ("t", "freedom", "p"), [(2.132, 4, 0.05), (4.303, 2, 0.025), (1.0, 1, 0.25), (1.6449, 1e6, 0.05)]
)
def test_t_distribution(t, freedom, p):
    assert table.t_tail(t, freedom) == pytest.approx(p, abs=1e-3)


def test_table_has_a_column_for_each_dataset_and_number_of_shots():
    found = table.records(
        results("lora", [0.5, 0.6], 16) + results("lora", [0.4, 0.5], 4) + results("full", [0.7, 0.8], 4)
    )
    assert table.columns(found) == [("d", 4), ("d", 16)]
    rows = {row["method"]: row for row in table.rows(found)}
    assert rows["lora"]["cells"][("d", 16)]["mean"] == pytest.approx(0.55)
    assert ("d", 16) not in rows["full"]["cells"]
    assert "–" in table.markdown(found)
    assert len(table.results_csv(found).splitlines()) == 7


def test_measured_table_tells_what_lies_beyond_the_noise():
    from lab.bench import fewshot_table

    runs = []
    for method, four, sixteen in (
        ("zero-shot", [0.24] * 3, [0.24] * 3),
        ("lora", [0.30, 0.31, 0.32], [0.40, 0.41, 0.42]),
        ("vera", [0.24, 0.25, 0.23], [0.25, 0.24, 0.25]),
    ):
        for one, other in zip(results(method, four), results(method, sixteen, 16), strict=True):
            one["result"]["shots"] += other["result"]["shots"]
            runs.append(one)
    for run_ in runs:
        for part in run_["result"]["shots"]:
            part["cpu_seconds"] = 2.0
    made = fewshot_table.report(table.records(runs))
    verdicts = {row["method"]: (*row["above_zero_shot"], row["more_shots_better"]) for row in made["rows"]}
    assert verdicts["lora"] == (True, True, True)
    assert verdicts["vera"] == (False, False, False)
    assert made["cpu_seconds"] == 2 * 18
    text = "\n".join(fewshot_table.lines(made | {"preset": "short"}))
    assert "| LoRA | 10 | **31.0 ± 1.0** | **41.0 ± 1.0** | yes | yes | yes | 2.0 |" in text
    assert "36 CPU seconds in all" in text


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


def test_failed_method_does_not_stop_the_others(micro, tmp_path):
    made = spec(methods={"nora": {"r_outer": 500}, "zero-shot": {}}, shots=[1])
    runs = comparison.run_all(tmp_path, "fewshot", made, lambda _planned: silent)
    assert [r["state"] for r in runs] == ["failed", "done"]
    assert "500" in runs[0]["message"]


def test_base_rows_need_no_torch_and_name_their_size():
    assert isinstance(BASES["tiny-clip"], Base)
    assert BASES["tiny-clip"].resolution > 0
    assert task_module.name("coop-16") == "CoOp (16 tokens)"
