"""The few-shot tab's handlers as plain functions: what it submits, what it shows, and to whom."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lab import datasets
from lab.clip import table
from lab.errors import LabError
from lab.runs import Store
from lab.ui import _fewshot_html as html
from lab.ui import _fewshot_results as results
from lab.ui import discover, fewshot

VALUES = {
    "dataset": "openmoji", "also": [], "classes": "", "template": "a {}", "shots": [4], "seeds": "1, 2", "methods": ["zero-shot"],
    "adapters": ["nora"], "base": "tiny-clip", "preset": "", "encoder": "both", "targets": ["q", "v"], "steps": 0,
}  # fmt: skip
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path))
    made = Store(tmp_path)
    yield made
    made.close()


def test_tab_is_found():
    assert "fewshot" in [tab.id for tab in discover()]


def test_submits_what_was_entered(store):
    cid = fewshot.submit(store, "me", VALUES)
    found = store.comparison("me", cid)
    assert [(r.method, r.seed) for r in found.runs] == [("zero-shot", 1), ("nora", 1), ("zero-shot", 2), ("nora", 2)]
    assert found.spec["targets"] == "q,v"
    assert found.spec["template"] == "a {}"
    assert found.spec["classes"] is None
    names = list(datasets.resolve("").listing().classes)
    names[0] = "flying thing"
    edited = fewshot.to_spec(VALUES | {"classes": "\n".join(names)})
    assert edited["classes"] == names
    assert results.comparisons(store, "me")[0].id == cid
    assert results.comparisons(store, "you") == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"base": "/etc"}, "Unknown model"),
        ({"base": "assets/tiny-clip"}, "Unknown model"),
        ({"base": "ViT-B-16:../../weights.safetensors"}, "Unknown model"),
        ({"dataset": "/etc"}, "Unknown dataset"),
        ({"dataset": None}, ""),
        ({"also": ["digits", "/etc"]}, "Unknown dataset"),
        ({"also": ["upload:" + "0" * 40]}, "not found"),
        ({"seeds": "one"}, "Seeds must be whole numbers"),
        ({"methods": [], "adapters": []}, "at least one method"),
        ({"classes": "a\nb"}, "has 12 classes, 2 names were given"),
        ({"shots": []}, "at least one number of shots"),
    ],
)
def test_what_a_visitor_may_not_give_is_one_sentence(store, given, sentence):
    if not sentence:
        assert fewshot.to_spec(VALUES | given)["dataset"] == "openmoji"  # an empty choice is the embedded set
        return
    with pytest.raises(LabError, match=sentence.replace("(", r"\(")):
        fewshot.submit(store, "me", VALUES | given)


def test_panel_of_a_fresh_comparison_and_of_a_strangers(store):
    cid = fewshot.submit(store, "me", VALUES)
    shown = results.refresh(store, "me", cid, "", None)
    assert "NoRA" in shown[2]
    assert "0 of 4 runs over" in shown[2]
    assert "The table begins when" in shown[4]
    again = results.refresh(store, "me", cid, shown[-1], None)
    assert again[-1] == shown[-1]
    with pytest.raises(LabError, match="not found"):
        results.refresh(store, "you", cid, "", None)
    with pytest.raises(LabError, match="not found"):
        results.try_picture(store, "you", cid, "x.png")
    with pytest.raises(LabError, match="no such action"):
        results.act(store, "me", "rm", "x")


def test_several_datasets_have_columns_and_an_average():
    part = {"shots": 4, "trainable_parameters": 7, "train_seconds": 1.0, "peak_memory_bytes": 5}
    runs = [
        {"result": {"method": "lora", "seed": seed, "dataset": "openmoji", "shots": [
            part | {"dataset": "openmoji", "accuracy": first}, part | {"dataset": "digits", "accuracy": 0.5}]}}
        for seed, first in ((1, 0.7), (2, 0.9))
    ]  # fmt: skip
    found = table.records(runs)
    shown = html.results(found)
    assert "OpenMoji by category (embedded)" in shown
    assert "Handwritten digits (embedded)" in shown
    assert "Average" in shown
    assert "65.0 ± 7.1" in shown
    assert results.cells(found) == [
        {
            "method": "lora",
            "name": "LoRA",
            "shots": 4,
            "mean": pytest.approx(0.65),
            "spread": pytest.approx(0.0707, abs=1e-3),
        }
    ]
    assert results.points(found)[0]["mean"] == pytest.approx(0.65)
    assert "Handwritten digits" in results.run_choices(found)[-1][0]
    written = html.written(
        {"dataset": "openmoji", "also": ["digits"], "template": "a {}", "preset": "short", "base": "tiny-clip",
         "targets": "q", "encoder": "both", "seeds": [1, 2]}
    )  # fmt: skip
    assert "Handwritten digits (embedded), each with its own template" in written


def finished(store, cid: str, shots: int = 4) -> None:
    """What a training process would leave for the first run, by hand: two classes confused, one picture wrong."""
    run = store.comparison("me", cid).runs[0]
    run.folder.mkdir(parents=True, exist_ok=True)
    confusion = [[0] * 12 for _ in range(12)]
    confusion[0][1] = 20
    for i in range(1, 12):
        confusion[i][i] = 20
    picture = datasets.resolve("").listing().test[0].key
    part = {
        "shots": shots, "accuracy": 11 / 12, "trainable_parameters": 0, "adapter_bytes": 0, "train_seconds": 0.0,
        "peak_memory_bytes": 1, "validation_accuracy": 0.5, "best_step": 0, "steps": 0, "lr": None, "settled": {},
        "per_class": [0.0] + [1.0] * 11, "per_class_count": [20] * 12, "confusion": confusion, "confused": [],
        "wrong": [{"picture": picture, "truth": 0, "predicted": 1, "confidence": 0.9, "truth_probability": 0.05}],
    }  # fmt: skip
    result = {"method": run.method, "seed": run.seed, "dataset": "openmoji", "shots": [part]}
    (run.folder / "result.json").write_text(json.dumps(result))
    (run.folder / "validation.jsonl").write_text(
        '{"shots": 4, "rate": 0.1, "step": 0, "accuracy": 0.2}\n{"shots": 4, "rate": 0.1, "step": 9, "accuracy": 0.6}\n{"sho'
    )


def test_results_of_a_finished_run(store):
    cid = fewshot.submit(store, "me", VALUES)
    with pytest.raises(LabError, match="No method has finished"):
        results.try_picture(store, "me", cid, "x.png")
    finished(store, cid)
    store._table.finish(store._table.claim("worker")["id"], "done")
    found = store.comparison("me", cid)
    curve = results.curves(found)
    assert curve[0]["points"] == [(0, 0.2), (9, 0.6)]  # the line that is being written is left for later
    records = results.records(found)
    shown = results.refresh(store, "me", cid, "", None)
    assert "91.7" in shown[4]
    per_class, matrix, wrong = results.one_run(store, "me", cid, results.run_choices(records)[0][1])
    assert per_class.index("bird fish or insect") < per_class.index("building")  # the worst class first
    assert matrix.data[0].z[0][1] == 1.0
    assert "90%" in wrong
    assert "data:image/jpeg;base64," in wrong
    assert results.points(records)[0]["parameters"] == 0
    assert results.cells(records)[0]["shots"] == 4


def test_names_with_markup_stay_text(tmp_path):
    record = {
        "per_class": [0.5, 1.0], "per_class_count": [2, 2], "dataset": "openmoji", "confusion": [[1, 1], [0, 2]],
        "wrong": [],
    }  # fmt: skip
    answers = [{"method": "lora", "seed": 1, "top": [(MARKUP, 0.9)]}, {"method": "nora", "seed": 1, "error": MARKUP}]
    for made in (html.per_class(record, [MARKUP, "b"]), html.answers(answers)):
        assert "<img src=x" not in made
        assert "&lt;img" in made
    from lab.plots import PLOTS

    figure = PLOTS["fewshot-confusion"].draw([{"classes": [MARKUP, "b"], "confusion": record["confusion"]}])
    assert "<" not in figure.layout.xaxis.ticktext[0]


def test_classes_with_thumbnails_and_counts(store, tmp_path):
    shown = html.classes("openmoji")
    assert shown.count("<img") == 12 * 4
    assert "24 to train, 20 to test" in shown
    assert "CC BY-SA 4.0" in shown
    for i in range(70):
        folder = tmp_path / "many" / f"{MARKUP.replace('/', '')}{i}"
        folder.mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (16, 16), (i, j * 90, 0)).save(folder / f"{j}.png")
    from lab.datasets import _upload

    many = html.classes(_upload.take(tmp_path / "many"))
    assert "and 10 more classes" in many
    assert "<img src=x" not in many


def test_protocol_is_written_beside_the_table(store):
    cid = fewshot.submit(store, "me", VALUES)
    text = html.written(store.comparison("me", cid).spec)
    assert "a run looks at them once" in text
    assert "tiny-clip" in text
    assert "seeds 1, 2" in text
