"""Compress and merge as tasks of the queue and as sections of the X-ray tab."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from lab.adapter_store import Adapters
from lab.errors import LabError
from lab.runs import Store
from lab.tasks import TASKS, PlannedRun
from lab.tasks._adapters import as_inputs, sources
from lab.ui import _xray_compress, _xray_jobs, _xray_merge
from tests.compress_helpers import saved_lora

pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


@pytest.fixture(scope="module")
def fox(small_sdxl, tmp_path_factory):
    """A LoRA of the small base, as PEFT saves it."""
    unet = small_sdxl.load("cpu", torch.float32).unet
    return saved_lora(unet, "small-sdxl", 3, 0.3, tmp_path_factory.mktemp("fox"))


def quiet(done, total, **values):
    assert 0 <= done <= max(total, 1)


def placed(folder, paths):
    for name, path in as_inputs(paths).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    assert len(sources(folder)) == len(paths)
    return folder


def ran(id, spec, inputs, tmp_path):
    task = TASKS[id]
    spec = task.check(spec)
    found = {}
    for planned in task.plan(spec):
        folder = tmp_path / "runs" / f"{planned.method}-s{planned.seed}"
        found[planned.method] = task.run(spec, planned, inputs, folder, quiet), folder
        json.dumps(found[planned.method][0], allow_nan=False)
    return found


def apart(a, b):
    return max(
        (x - y).abs().max().item()
        for x, y in zip(*([torch.frombuffer(bytearray(Image.open(p).convert("RGB").tobytes()), dtype=torch.uint8).int()
                           for p in sorted((f / "samples").glob("*.png"))] for f in (a, b)), strict=True)
    )  # fmt: skip


def test_compress_draws_before_and_after_and_exports(fox, tmp_path):
    inputs = placed(tmp_path / "inputs", [fox])
    spec = {"name": "fox", "base": "small-sdxl", "methods": {"lora": {"r": 2}, "nora": {}}, "budget": None,
            "prompts": ["a fox", "a car"], "sample_seeds": [3]}  # fmt: skip
    spec["methods"]["nora"] = {"r_outer": 8, "r_inner": 2}
    found = ran("compress", spec, inputs, tmp_path)
    assert list(found) == ["base", "original", "lora", "nora"]
    assert all(len(list((folder / "samples").glob("*.png"))) == 2 for _, folder in found.values())
    same, folder = found["lora"]
    assert same["relative_error"] < 1e-6
    assert same["original"]["parameters"] == same["parameters"] == same["trainable_parameters"]
    assert same["picture_distance"] < 1e-4
    assert apart(folder, found["original"][1]) <= 2
    assert apart(found["base"][1], found["original"][1]) > 4
    nora, folder = found["nora"]
    assert 0 < nora["relative_error"] < 1
    assert nora["picture_distance"] > same["picture_distance"]
    assert nora["exports"]["kohya"] < 1e-5
    assert {p.name for p in (folder / "export").iterdir()} == {"diffusers.safetensors", "kohya.safetensors"}
    assert not (folder / "adapter.tmp").exists()


def test_a_finished_fit_is_not_made_again(fox, tmp_path, monkeypatch):
    inputs = placed(tmp_path / "inputs", [fox])
    spec = {"name": "fox", "base": "small-sdxl", "methods": ["pranc"], "budget": 200, "prompts": []}
    before = ran("compress", spec, inputs, tmp_path)
    monkeypatch.setattr("lab.tasks._adapter_run.compress_file", None)
    assert ran("compress", spec, inputs, tmp_path)["pranc"][0] == before["pranc"][0]


def test_merge_is_the_sum_and_draws_each(fox, tmp_path):
    from lab.adapter_files import read

    inputs = placed(tmp_path / "inputs", [fox, fox / "adapter_model.safetensors"])
    spec = {"names": ["fox", "other"], "base": "small-sdxl", "weights": [0.5, 0.25], "prompts": ["a fox"],
            "sample_seeds": [1]}  # fmt: skip
    found = ran("merge", spec, inputs, tmp_path)
    assert list(found) == ["base", "adapter-1", "adapter-2", "merged"]
    result, folder = found["merged"]
    assert result["relative_error"] < 1e-6
    assert apart(found["adapter-1"][1], found["adapter-2"][1]) <= 2
    one, both = read(fox, "small-sdxl").updates, read(folder / "adapter", "small-sdxl").updates
    for name, update in both.items():
        assert (update.dense() - 0.75 * one[name].dense()).norm() < 1e-5 * update.dense().norm()


BAD = [
    ("compress", {"methods": []}, "at least one method"),
    ("compress", {"methods": ["vera"]}, "vera"),
    ("compress", {"methods": {"nora": {"outer": "gradient"}}}, "training data"),
    ("compress", {"budget": 0}, "at least 1"),
    ("compress", {"budget": "many"}, "number"),
    ("compress", {"prompts": ["x"] * 7}, "prompts"),
    ("compress", {"prompts": [""]}, "empty"),
    ("compress", {"sample_seeds": [1, 1]}, "different seeds"),
    ("compress", {"base": "nothing-here"}, "nothing-here"),
    ("compress", {"budgets": 3}, "budgets"),
    ("merge", {"names": ["a"]}, "2 to 8"),
    ("merge", {"names": ["a", "b"], "weights": [1]}, "one weight"),
    ("merge", {"names": ["a", "b"], "how": "slerp"}, "slerp"),
    ("merge", {"names": ["a", "b"], "how": "svd", "rank": "4"}, "whole number"),
    ("merge", {"names": ["a", "b"], "density": "x"}, "density"),
]


@pytest.mark.parametrize(("task", "spec", "words"), BAD)
def test_bad_specs_are_one_sentence(task, spec, words):
    with pytest.raises(LabError, match=words) as problem:
        TASKS[task].check(spec)
    assert "\n" not in str(problem.value)


# -- the page ---------------------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(_xray_jobs, "ensure_worker", lambda home: 0)
    return Store(tmp_path / "home")


def sent(store, owner, fox):
    return Adapters(store.home, owner).add([(p, p.name) for p in sorted(fox.iterdir()) if p.suffix != ".md"])


def test_the_page_submits_a_job_whose_inputs_are_its_own(store, fox):
    ref = sent(store, "ann", fox)
    cid = _xray_compress.submit(store, "ann", ref, "", ["nora", "lora"], 500, "a fox\n\n a car ")
    found = store.comparison("ann", cid)
    assert [run.method for run in found.runs] == ["base", "original", "nora", "lora"]
    assert found.spec["prompts"] == ["a fox", "a car"]
    (source,) = sources(found.inputs)
    Adapters(store.home, "ann").remove(ref.partition(":")[2])  # the file goes, the job keeps its copy
    assert (source / "adapter_model.safetensors").read_bytes() == (fox / "adapter_model.safetensors").read_bytes()
    html, _, timer = _xray_jobs.shown(store, "ann", "compress", cid)
    assert html.count("data-run=") == 4
    assert timer.active


def test_a_strangers_adapter_and_job_are_not_there(store, fox):
    ref = sent(store, "ann", fox)
    with pytest.raises(LabError, match="not there"):
        _xray_compress.submit(store, "bob", ref, "", ["nora"], 500, "")
    mine = sent(store, "bob", fox)
    with pytest.raises(LabError, match="not there"):
        _xray_merge.submit(store, "bob", mine, "", [ref], "", "concat", None, 0.5, "")
    cid = _xray_compress.submit(store, "ann", ref, "", ["nora"], 500, "")
    assert "not found" in _xray_jobs.shown(store, "bob", "compress", cid)[0]
    assert _xray_jobs.jobs(store, "bob", "compress") == []
    with pytest.raises(LabError, match="not found"):
        _xray_jobs.act(store, "bob", "cancel", store.comparison("ann", cid).runs[0].id)
    assert _xray_jobs.shown(store, "ann", "merge", cid)[0] == ""  # another task's job


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("", "", ["nora"], 500, ""), "No adapter is open"),
        (("run:xyz", "", ["nora"], 500, ""), "not found"),
        (("REF", "somewhere/else", ["nora"], 500, ""), "not on this machine"),
        (("REF", "", [], 500, ""), "at least one method"),
        (("REF", "", ["nora"], None, ""), None),
    ],
)
def test_the_page_tells_what_does_not_fit(store, fox, values, words):
    ref = sent(store, "ann", fox)
    values = [ref if v == "REF" else v for v in values]
    if words is None:
        assert store.comparison("ann", _xray_compress.submit(store, "ann", *values)).spec["budget"] == 20_000
        return
    with pytest.raises(LabError, match=words):
        _xray_compress.submit(store, "ann", *values)


def test_results_are_shown_with_their_files(store, fox):
    ref = sent(store, "ann", fox)
    cid = _xray_compress.submit(store, "ann", ref, "", ["nora"], 500, "<b>a fox</b>")
    found = store.comparison("ann", cid)
    run = found.runs[-1]
    layers = [{"layer": "a.to_q", "m": 4, "n": 4, "norm": 1.0, "relative_error": 0.25}]
    result = {"original": {"name": "<i>fox", "kind": "lora", "parameters": 1000, "bytes": 9000}, "knobs": {"r_inner": 2},
              "how": "closed form", "parameters": 250, "bytes": 2048, "relative_error": 0.25, "layers": layers,
              "picture_distance": 0.01, "exports": {"kohya": 1e-9, "diffusers": 0.2}}  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "result.json").write_text(json.dumps(result))
    store._table.write("UPDATE runs SET state = 'done' WHERE id = ?", run.id)
    html, plot, _ = _xray_jobs.shown(store, "ann", "compress", cid)
    assert "25.0%" in html
    assert f"files/runs/{run.id}/kohya" in html
    assert "error 0.2" in html
    assert "<i>fox" not in html
    assert "<b>a fox" not in html
    assert plot.visible


def test_a_job_has_no_grid_and_says_so(store, fox):
    """Its pictures are on the page; `lab.compare` knows comparisons that train."""
    from lab.ui import files

    ref = sent(store, "ann", fox)
    jobs = [
        _xray_compress.submit(store, "ann", ref, "", ["nora"], 500, "a fox"),
        _xray_merge.submit(store, "ann", ref, "", [sent(store, "ann", fox)], "", "ties", None, 0.5, "a fox"),
    ]
    store._table.write("UPDATE runs SET state = 'done', finished = 1")
    for cid in jobs:
        for kind in files.KINDS:
            answer = files._answer(lambda cid=cid, kind=kind: files._made(store.comparison("ann", cid), kind))
            assert answer.status_code == 404
            assert b"no grid, table or report" in answer.body
    assert store.comparison("ann", jobs[0]).title == "Compress adapter_model"
    assert store.comparison("ann", jobs[1]).title == "Merge adapter_model + adapter_model (ties)"


def test_weights_are_read_from_words():
    assert _xray_merge.numbers("0.5, 1;2") == [0.5, 1.0, 2.0]
    assert _xray_merge.numbers(" ") is None
    with pytest.raises(LabError, match="numbers"):
        _xray_merge.numbers("half")


def test_plan_without_prompts_draws_nothing():
    spec = TASKS["compress"].check({"prompts": [], "methods": ["pranc"], "seed": 4})
    assert TASKS["compress"].plan(spec) == [PlannedRun("pranc", 4, {})]
