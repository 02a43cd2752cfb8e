"""Few-shot runs: what they do and leave, and what the scores and the table claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lab import comparison
from lab.clip import fit as fitting
from lab.clip import table
from lab.clip.method import Recipe
from lab.clip.pictures import TestSet, augment, prepare
from lab.clip.scores import score
from lab.datasets import Listing, Picture, resolve
from lab.errors import LabError
from lab.methods.clip import CLIP_METHODS
from lab.tasks import Cancelled, PlannedRun, _fewshot_run
from lab.tasks import fewshot as task_module
from tests import micro_clip
from tests.fewshot_helpers import TASK, fewshot_home, spec  # noqa: F401 - fewshot_home is a fixture


def silent(*_args, **_values):
    pass


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


def run(made: dict, folder: Path, planned: PlannedRun | None = None, report=silent) -> dict:
    return TASK.run(made, planned or TASK.plan(made)[0], folder, folder, report)


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


def test_failed_method_does_not_stop_the_others(micro, tmp_path):
    made = spec(methods={"nora": {"r_outer": 500}, "zero-shot": {}}, shots=[1])
    runs = comparison.run_all(tmp_path, "fewshot", made, lambda _planned: silent)
    assert [r["state"] for r in runs] == ["failed", "done"]
    assert "500" in runs[0]["message"]


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
    (pooled,) = made["together"]  # means 27.0, 28.0, 27.5 and 32.5, 32.5, 33.5
    assert (*pooled["above_zero_shot"], pooled["more_shots_better"]) == (True, True, True)
    assert "| All 2 adapters, mean | 10 | 27.5 ± 0.5 | 32.8 ± 0.6 | yes | yes | yes | 2.0 |" in text
