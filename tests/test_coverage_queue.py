"""Large layers of the Coverage tab: points kept on the disk, measured by the queue, each owner's job its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.coverage import curves, kept, report
from lab.errors import LabError
from lab.runs import Store
from lab.tasks import TASKS
from lab.ui import _coverage_queue as queue

LARGE = {"d": "34", "m": "pranc,nora", "n": "8,40"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LAB_HOME", str(tmp_path))
    monkeypatch.setattr(queue, "ensure_worker", lambda home: None)
    curves._known.clear()
    yield tmp_path
    curves._known.clear()


def ran(store: Store, cid: str, id: str) -> tuple[dict[str, Any], list[Any]]:
    found, told = store.comparison("ann", cid), []
    planned = next(p for p in TASKS["coverage"].plan(found.spec) if p.method == id)
    result = TASKS["coverage"].run(
        found.spec, planned, found.inputs, found.folder, lambda done, of, **_: told.append((done, of))
    )
    json.dumps(result, allow_nan=False)
    store._table.write("UPDATE runs SET state = 'done' WHERE comparison = ? AND method = ?", cid, id)
    return result, told


def test_a_large_layer_goes_through_the_queue_and_is_there_after_a_restart(home: Path) -> None:
    store, asked = Store(home), report.view(LARGE)
    *_, before = report.answers(asked)
    assert before.rows == []
    assert [row["method"] for row in before.drawn] == ["pranc", "nora"]  # the closed forms stand at once
    assert report.missing(asked) == [("pranc", 8), ("pranc", 40), ("nora", 8), ("nora", 40)]
    button, html, timer = queue.shown(store, "ann", LARGE)
    assert (button.value, button.visible, html, timer.active) == ("Measure 4 points", True, "", False)

    cid = queue.submit(store, "ann", asked)
    assert queue.submit(store, "ann", report.view(LARGE | {"show": "local", "log": "1"})) == cid  # the same points
    button, html, timer = queue.shown(store, "ann", LARGE)
    assert not button.visible
    assert timer.active
    assert html.count("data-run=") == 2
    assert queue.shown(store, "bob", LARGE)[1] == ""  # a stranger has no such job
    assert queue.link_of(store, "bob", cid) == {}
    assert queue.link_of(store, "ann", cid) == asked.link()

    result, told = ran(store, cid, "pranc")
    assert result["points"] == 2
    assert told == [(0, 2), (1, 2), (2, 2)]
    curves._known.clear()  # another process, or another day
    *_, half = report.answers(asked)
    assert [(r["method"], r["rank"]) for r in half.rows] == [("pranc", 8), ("pranc", 40)]
    assert report.missing(asked) == [("nora", 8), ("nora", 40)]
    ran(store, cid, "nora")
    *_, last = report.answers(asked)
    assert len(last.rows) == 4
    assert report.missing(asked) == []
    assert not queue.shown(store, "bob", LARGE)[0].visible  # nothing is left to measure, for anybody
    assert report.spectrum(asked, "pranc", 40)["spectrum"]


def test_bad_jobs_are_one_sentence() -> None:
    for spec, words in (
        ({"view": {"d": "65"}}, "2 to 64"),
        ({"view": {"d": "40", "m": "lorra"}}, "lora"),
        ({"view": {"d": "40", "m": ""}}, "at least one method"),
        ({"view": "d=40"}, "names its view"),
        ({"views": {}}, "views"),
    ):
        with pytest.raises(LabError, match=words):
            TASKS["coverage"].check(spec)


def test_small_layers_are_kept_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "KEEP_S", 0.0)
    first = curves.point(curves.Question("nola", 8, 12, target="real"))
    curves._known.clear()
    monkeypatch.setattr(curves, "update_map", None)  # nothing is measured any more
    assert curves.point(curves.Question("nola", 8, 12, target="real")) == first
    (file,) = (home / "coverage").iterdir()
    file.write_text("{")  # cut off by a crash: measured again
    curves._known.clear()
    with pytest.raises(TypeError):
        curves.point(curves.Question("nola", 8, 12, target="real"))


def test_points_of_other_code_are_not_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = curves.Question("pranc", 33, 8)
    curves.point(asked)
    curves._known.clear()
    assert curves.remembered(asked) is not None
    read, changed = Path.read_bytes, "nothing"
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + (b"#" if str(file).endswith(changed) else b""))
    for changed in ("coverage/measure.py", "methods/pranc.py", "methods/_basis.py", "lab/budget.py", "lab/counter.py",
                    "difference.npz"):  # fmt: skip
        kept._code.cache_clear()
        curves._known.clear()
        assert curves.remembered(asked) is None, changed
    kept._code.cache_clear()


def test_what_is_kept_is_bounded_and_the_oldest_goes(home: Path) -> None:
    folder = home / "coverage"
    folder.mkdir()
    for age in range(6):
        (folder / f"{age}.json").write_text("{}")
        os.utime(folder / f"{age}.json", (1000 - age, 1000 - age))
    kept.sweep(folder, most=4)
    assert {file.name for file in folder.iterdir()} == {"0.json", "1.json", "2.json", "3.json"}


def test_a_folder_that_may_not_be_written_keeps_nothing(home: Path) -> None:
    (home / "coverage").write_text("in the way")
    assert curves.point(curves.Question("pranc", 33, 8))["rank"] == 8
