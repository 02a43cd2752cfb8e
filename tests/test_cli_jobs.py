"""`python -m lab jobs`, as whoever keeps the machine uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab.cli import main
from lab.runs import Store
from tests import queue_task

assert queue_task.Toy.id == "toy"  # imported for its registration


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LAB_HOME", str(tmp_path))
    monkeypatch.setenv("LAB_MIN_FREE_MB", "0")
    monkeypatch.setenv("LAB_EXTRA_TASKS", "tests.queue_task")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Store()


def submit(store: Store, owner: str) -> str:
    return store.submit(owner, "toy", {"steps": 3}, [Image.new("RGB", (20, 20))])


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["jobs", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["jobs", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_the_whole_life_of_a_run(store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert answer(capsys) == answer(capsys, "list") == []
    one, other = submit(store, "one"), submit(store, "other")
    rows = answer(capsys)
    assert [row["comparison"] for row in rows] == [other, other, one, one]
    assert [row["method"] for row in answer(capsys, "list", "--method", "lora", "--state", "queued")] == ["lora"] * 2
    run = rows[1]["id"]
    assert answer(capsys, "cancel", run[:10])["state"] == "cancelled"
    monkeypatch.setattr("lab.jobs.ensure_worker", lambda home: 0)
    assert answer(capsys, "retry", run)["state"] == "queued"
    assert answer(capsys, "worker", "--drain")["worker"] == "local-main"
    shown = answer(capsys, "show", run[:10])
    assert shown["state"] == "done"
    assert shown["result"]["value"] == queue_task.expected(0, 3)
    assert "--- attempt 1" in shown["log"]
    assert answer(capsys, "delete", one[:10])["comparison"] == one
    assert {row["comparison"] for row in answer(capsys)} == {other}
    assert not (store.home / "comparisons" / one).exists()


def test_for_people(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == "No runs.\n"
    run = store.comparison("me", submit(store, "me")).runs[0].id
    assert main(["jobs"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split() == [run[:8], "base", "s0", "queued", "number", "1", "in", "the", "queue"]
    assert main(["jobs", "show", run]) == 0
    assert "state        queued" in capsys.readouterr().out
    assert main(["jobs", "delete", run]) == 0
    assert "is deleted" in capsys.readouterr().out


def test_bad_input(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No run begins with 'nothing'" in refusal(capsys, "show", "nothing")
    submit(store, "me")
    assert "2 runs begin with ''" in refusal(capsys, "cancel", "")
    assert "No comparison begins with 'x'" in refusal(capsys, "delete", "x")
    assert "no state 'asleep'" in refusal(capsys, "list", "--state", "asleep")
    with pytest.raises(SystemExit) as caught:
        main(["jobs", "dance"])
    assert caught.value.code == 2
