"""Visitors' adapter files: kept for their owner alone, in every form they are sent in, and swept when old."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lab import adapter_store
from lab.adapter_files import CONFIG, WEIGHTS, read
from lab.adapter_store import Adapters
from lab.errors import LabError
from lab.runs import Store
from lab.ui import xray
from tests import page_server
from tests.test_xray import NAMES, adapter


def test_what_is_sent_is_kept_for_its_owner_only(tmp_path):
    store = Store(tmp_path / "home")
    path = adapter(tmp_path / "fox <i>.safetensors")
    ref = xray.keep(store, "anna", [str(path)])
    found = adapter_store.chosen(store, "anna", ref)
    assert (found.title, found.path.name) == ("fox <i>", WEIGHTS)
    assert found.path.read_bytes() == path.read_bytes()
    assert [c.ref for c in adapter_store.choices(store, "anna")] == [ref]
    assert adapter_store.choices(store, "bert") == []
    for owner, asked in (
        ("bert", ref),
        ("anna", "file:../../x"),
        ("anna", ""),
        ("anna", None),
        ("anna", "run:" + "a" * 16),
    ):
        with pytest.raises(LabError):
            adapter_store.chosen(store, owner, asked)


def test_a_peft_folder_is_sent_as_two_files_or_a_zip(tmp_path):
    store, sent = Store(tmp_path / "home"), Adapters(tmp_path / "home", "anna")
    tensors = {f"base_model.model.{NAMES[0]}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    ref = sent.add([(tmp_path / CONFIG, CONFIG), (tmp_path / WEIGHTS, WEIGHTS)])
    assert read(adapter_store.chosen(store, "anna", ref).path).alpha == 6
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as file:
        file.write(tmp_path / CONFIG, f"run/{CONFIG}")
        file.write(tmp_path / WEIGHTS, f"run/{WEIGHTS}")
    ref = sent.add([(tmp_path / "run.zip", "run.zip")])
    assert adapter_store.chosen(store, "anna", ref).title == "run"
    for files, says in (
        ([(tmp_path / CONFIG, CONFIG)], "Send one"),
        ([(tmp_path / WEIGHTS, WEIGHTS)] * 2, "2 files were sent"),
        ([(tmp_path / WEIGHTS, "model.ckpt")], "pickle"),
        ([(tmp_path / "run.zip", "run.zip"), (tmp_path / CONFIG, CONFIG)], "the zip alone"),
        ([(tmp_path / WEIGHTS, "a.txt")], "Send one"),
        ([(tmp_path / WEIGHTS, WEIGHTS), (tmp_path / WEIGHTS, "x.json")], "is no adapter_config.json"),
    ):
        with pytest.raises(LabError, match=says):
            sent.add(files)
    assert len(sent.records()) == 2
    assert not list(sent.folder.glob(".incoming*"))


def test_old_files_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_store, "KEPT", 2)
    sent = Adapters(tmp_path, "anna")
    refs = [sent.add([(adapter(tmp_path / f"{i}.safetensors", seed=i), f"{i}.safetensors")]) for i in range(3)]
    assert [f"file:{r['id']}" for r in sent.records()] == refs[:0:-1]
    monkeypatch.setattr(adapter_store, "max_stored", lambda: 100)
    with pytest.raises(LabError, match="at most"):
        sent.add([(tmp_path / "0.safetensors", "0.safetensors")])
    adapter_store.sweep(tmp_path, days=-1)
    assert sent.records() == []


def test_finished_runs_can_be_opened_with_their_siblings(tmp_path):
    store = Store(tmp_path / "home")
    spec = {"class_word": "fox", "methods": {"lora": {}, "nora": {}}, "seeds": [0, 1]}
    store.submit("anna", "subject", spec, page_server.pictures())
    assert adapter_store.choices(store, "anna") == []
    for run in store.runs("anna"):
        page_server.finish(run, store)
    found = adapter_store.choices(store, "anna")
    assert {(c.method, c.seed) for c in found} == {("lora", 0), ("lora", 1), ("nora", 0), ("nora", 1)}
    assert any("NoRA · seed 1" in c.title for c in found)
    assert found[0].base == "tiny-sdxl"
    assert adapter_store.siblings(store, "anna", found[0]) == found[1:]
    with pytest.raises(LabError):
        adapter_store.chosen(store, "bert", found[0].ref)
    assert [value for _, value in xray.others(store, "anna", found[0]).choices] == [c.ref for c in found[1:]]
