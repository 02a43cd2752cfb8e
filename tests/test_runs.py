"""The store: what is submitted is there whole, and only for its owner."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab.errors import LabError
from lab.jobs.folders import STRAY_SECONDS, sweep
from lab.jobs.table import Table
from lab.runs import ANYONE, Store
from tests import queue_task  # registers the task "toy"

ROOT = Path(__file__).resolve().parents[1]
ME, OTHER = "me", "somebody else"


@pytest.fixture(name="store")
def plain_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LAB_MIN_FREE_MB", "0")
    return Store(tmp_path / "home")


def pictures(number: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (24, 24), (n, 0, 0)) for n in range(number)]


def submit(store: Store, owner: str = ME, **spec: Any) -> str:
    return store.submit(owner, "toy", spec, pictures())


def finish(store: Store, run_id: str, state: str = "done", message: str = "") -> None:
    while (row := store._table.claim("w")) is not None and row["id"] != run_id:
        store._table.finish(row["id"], "done")
    store._table.finish(run_id, state, message)


def files(home: Path) -> list[str]:
    return sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file() and not p.name.startswith("lab.db"))


def test_submission(store: Store) -> None:
    cid = submit(store, methods={"lora": {"r": 4}, "nora": {}}, seeds=[0, 1])
    comparison = store.comparison(ME, cid)
    assert comparison.title == "fox: lora, nora"
    assert comparison.state == "queued"
    assert comparison.spec["steps"] == queue_task.DEFAULTS["steps"]  # checked, with defaults
    assert json.loads((comparison.folder / "spec.json").read_text()) == comparison.spec
    assert sorted(p.name for p in comparison.inputs.iterdir()) == ["000.png", "001.png", "002.png"]
    assert Image.open(comparison.inputs / "002.png").getpixel((0, 0)) == (2, 0, 0)
    assert [(r.method, r.seed, r.knobs, r.position) for r in comparison.runs] == [
        ("base", 0, {}, 1),
        ("lora", 0, {"r": 4}, 2),
        ("lora", 1, {"r": 4}, 3),
        ("nora", 0, {}, 4),
        ("nora", 1, {}, 5),
    ]
    assert comparison.runs[1].folder == comparison.folder / "runs" / "lora-s0"
    assert len(cid) == 24
    assert len({cid} | {r.id for r in comparison.runs}) == 6
    assert json.loads(json.dumps(comparison.runs[1].as_dict()))["result"] is None


def test_pictures_are_stored_without_metadata(store: Store) -> None:
    picture = Image.new("RGB", (24, 24))
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    picture.info |= {"exif": exif.tobytes(), "icc_profile": b"profile", "comment": "secret", "dpi": (72, 72)}
    cid = store.submit(ME, "toy", {}, [picture])
    stored = (store.comparison(ME, cid).inputs / "000.png").read_bytes()
    assert Image.open(store.comparison(ME, cid).inputs / "000.png").info == {}
    assert b"home" not in stored
    assert b"secret" not in stored


def test_nothing_of_another_owner(store: Store) -> None:
    cid = submit(store)
    run = store.comparison(ME, cid).runs[0].id
    missing = "0" * 24
    calls = [store.run, store.cancel, store.retry, store.log_tail, store.metrics]
    for call in calls:
        messages = set()
        for owner, id in ((OTHER, run), (ME, missing), ("", run), (OTHER, missing)):
            with pytest.raises(LabError) as caught:
                call(owner, id)
            messages.add(str(caught.value))
        assert messages == {"This run was not found: it was deleted, or it is not yours."}
    for call in (store.comparison, store.delete, store.cancel_comparison):
        messages = set()
        for owner, id in ((OTHER, cid), (ME, missing), (ME, run)):
            with pytest.raises(LabError) as caught:
                call(owner, id)
            messages.add(str(caught.value))
        assert messages == {"This comparison was not found: it was deleted, or it is not yours."}
    assert store.comparisons(OTHER) == store.runs(OTHER) == []
    assert store.run(ME, run).state == "queued"  # untouched
    assert store.run(ANYONE, run).id == run
    with pytest.raises(TypeError):
        store.runs(None)  # a bug in a handler must not become "everybody"


@pytest.mark.parametrize("id", ["", "../../etc/passwd", "%", "' OR 1=1 --", "0" * 23 + "\n", "A" * 24, None, 7, ["x"]])
def test_strange_ids(store: Store, id: Any) -> None:
    submit(store)
    for call in (store.run, store.comparison, store.delete, store.log_tail):
        with pytest.raises(LabError, match="was not found"):
            call(ME, id)


def test_filters(store: Store) -> None:
    submit(store, class_word="50%_cat", methods={"nora": {}})
    submit(store, class_word="fox", methods={"lora": {}})
    assert [r.method for r in store.runs(ME)] == ["base", "lora", "base", "nora"]  # newest comparison first
    assert [r.method for r in store.runs(ME, method="nora")] == ["nora"]
    assert len(store.runs(ME, text="FOX")) == 2
    assert len(store.runs(ME, text="0%_c")) == 2
    assert len(store.runs(ME, text="%")) == 2  # a character, not a wildcard
    assert store.runs(ME, state="done") == []
    assert len(store.runs(ME, state="queued", method="base", text="cat")) == 1
    with pytest.raises(LabError, match="no state 'sleeping'"):
        store.runs(ME, state="sleeping")


def test_cancel_and_retry(store: Store) -> None:
    base, run = store.comparison(ME, submit(store)).runs
    assert store.cancel(ME, run.id).state == "cancelled"
    with pytest.raises(LabError, match="cancelled already"):
        store.cancel(ME, run.id)
    with pytest.raises(LabError, match="only failed and cancelled"):
        store.retry(ME, base.id)
    retried = store.retry(ME, run.id)
    assert (retried.state, retried.position, retried.attempt) == ("queued", 2, 0)
    finish(store, base.id)
    with pytest.raises(LabError, match="done already"):
        store.cancel(ME, base.id)
    finish(store, run.id, "failed", "It did not work.")
    assert store.run(ME, run.id).message == "It did not work."
    assert store.retry(ME, run.id).message == ""


def test_cancel_comparison(store: Store) -> None:
    cid = submit(store, seeds=[0, 1])
    store._table.claim("w")
    comparison = store.cancel_comparison(ME, cid)
    assert [(r.state, r.cancelling) for r in comparison.runs] == [
        ("running", True),
        ("cancelled", False),
        ("cancelled", False),
    ]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["queued", "queued"], "queued"),
        (["running", "queued"], "running"),
        (["done", "queued"], "running"),
        (["done", "failed"], "failed"),
        (["done", "cancelled"], "cancelled"),
        (["failed", "cancelled"], "failed"),
        (["done", "done"], "done"),
    ],
)
def test_state_of_a_comparison(store: Store, states: list[str], expected: str) -> None:
    cid = submit(store)
    for run, state in zip(store.comparison(ME, cid).runs, states, strict=True):
        store._table.write("UPDATE runs SET state = ? WHERE id = ?", state, run.id)
    assert store.comparison(ME, cid).state == expected


def test_owners_take_turns(store: Store) -> None:
    """A visitor with one comparison waits for one run of the other's, not for all."""
    many, few = submit(store, owner="many", seeds=list(range(4))), submit(store, owner="few")
    assert store.comparison("few", few).runs[0].position == 2
    taken = []
    while (row := store._table.claim("w")) is not None:
        positions = [run.position for run in store.runs(ANYONE) if run.position]
        assert sorted(positions) == list(range(1, len(positions) + 1))
        taken.append((row["comparison"] == few, row["method"]))
        store._table.finish(row["id"], "done")
    assert [method for mine, method in taken if mine] == ["base", "lora"]
    assert [mine for mine, _ in taken] == [False, True, False, True, False, False, False]
    assert store.comparison("many", many).state == "done"


def test_interrupted_run_keeps_its_place(store: Store) -> None:
    first, second = (run.id for run in store.comparison(ME, submit(store)).runs)
    store._table.claim("w")
    store._table.requeue(first, "to be resumed", "It was interrupted.")
    assert (store.run(ME, first).position, store.run(ME, first).message) == (1, "It was interrupted.")
    assert store._table.claim("w")["attempt"] == 2
    assert store._table.claim("w")["id"] == second


def test_delete(store: Store) -> None:
    kept, cid = submit(store), submit(store)
    running = store._table.claim("w")
    other = store.comparison(ME, kept)
    assert running["comparison"] == kept
    with pytest.raises(LabError, match="still going: cancel it first"):
        store.delete(ME, kept)
    store.delete(ME, cid)
    assert [c.id for c in store.comparisons(ME)] == [kept]
    assert store._table.read("SELECT count(*) FROM runs")[0][0] == 2
    assert all(cid not in name for name in files(store.home))
    assert other.inputs.exists()
    store._table.finish(running["id"], "done")
    store.delete(ME, kept)
    assert files(store.home) == []


def test_submission_that_fails_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        with pytest.raises(LabError, match=r"The disk is full, so nothing was submitted"):
            submit(store)
    with monkeypatch.context() as patched:  # the last step of all
        patched.setattr(Path, "replace", full)
        with pytest.raises(LabError, match="The disk is full"):
            submit(store)
    assert store.comparisons(ME) == []
    assert files(store.home) == []
    with pytest.raises(LabError, match="steps must be between"):
        submit(store, steps=0)
    with pytest.raises(LabError, match=r"'\.\./x' is no method"):
        submit(store, methods={"../x": {}})
    with pytest.raises(LabError, match="no runs, or the same run twice"):
        submit(store, seeds=[1, 1])
    with pytest.raises(LabError, match="Unknown task 'dance'"):
        store.submit(ME, "dance", {}, pictures())
    with pytest.raises(LabError, match="too long"):
        submit(store, captions=["x" * 200_000])
    for nobody in ("", None, "x" * 300):
        with pytest.raises(ValueError, match="needs an owner"):
            store.submit(nobody, "toy", {}, pictures())
    assert files(store.home) == []


def test_full_disk_can_still_be_tidied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table cannot be written: not even that something is deleted, until the reserve is given up."""
    cid = submit(store)
    base, run = store.comparison(ME, cid).runs
    write = Table.write

    def full(table: Table, sql: str, *values: Any) -> int:
        if (store.home / "reserve").exists() or sql.startswith("UPDATE runs SET state = 'queued'"):
            raise sqlite3.OperationalError("database or disk is full")
        return write(table, sql, *values)

    store._table.keep_reserve()
    assert (store.home / "reserve").stat().st_size == 2**20
    monkeypatch.setattr(Table, "write", full)
    assert store.cancel(ME, run.id).state == "cancelled"
    assert not (store.home / "reserve").exists()
    with pytest.raises(LabError, match="The disk is full, so this could not be written down"):
        store.retry(ME, run.id)
    store._table.keep_reserve()
    store.delete(ME, cid)
    assert files(store.home) == []
    assert base.position == 1


KILLED_HALFWAY = """
import os, sys
from pathlib import Path
from tests.test_runs import Store, pictures
from lab.jobs import folders
import lab.runs
place = sys.argv[2]
if place == "writing":
    Path.write_text = lambda *a, **k: os._exit(9)
else:
    Path.replace = lambda *a: os._exit(9)  # all rows written, not committed
Store(sys.argv[1]).submit("me", "toy", {}, pictures())
"""


@pytest.mark.parametrize("place", ["writing", "moving"])
def test_killed_while_submitting(store: Store, place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_HALFWAY, str(store.home), place], check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 9
    assert store.comparisons(ME) == store.runs(ME) == []
    (stray,) = (store.home / "incoming").iterdir()
    sweep(store.home, store._table)
    assert stray.exists()  # it may be another process's, still writing
    os.utime(stray, (0, time.time() - STRAY_SECONDS - 10))
    kept = submit(store)
    (store.home / "comparisons" / ("a" * 24)).mkdir()  # moved in, never committed
    (store.home / "comparisons" / ("b" * 24 + ".deleted") / "runs").mkdir(parents=True)
    sweep(store.home, store._table)
    assert [p.name for p in (store.home / "comparisons").iterdir()] == [kept]
    assert list((store.home / "incoming").iterdir()) == []


def test_limits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_MAX_QUEUED", "5")
    first, _ = submit(store), submit(store)
    with pytest.raises(LabError, match="6 runs of yours in the queue, at most 5"):
        submit(store)
    monkeypatch.setenv("LAB_MAX_QUEUE", "7")
    submit(store, owner=OTHER)
    with pytest.raises(LabError, match="full with other people's runs"):
        submit(store, owner="third")
    monkeypatch.setenv("LAB_MAX_QUEUE", "0")
    monkeypatch.setenv("LAB_MAX_QUEUED", "0")
    monkeypatch.setenv("LAB_MAX_COMPARISONS", "2")
    with pytest.raises(LabError, match="2 stored comparisons, at most 2"):
        submit(store)
    run = store.comparison(ME, first).runs[1]
    store.cancel(ME, run.id)
    assert store.retry(ME, run.id).state == "queued"  # no new comparison
    monkeypatch.setenv("LAB_MAX_COMPARISONS", "0")
    store._table.write("UPDATE comparisons SET bytes = ? WHERE id = ?", 5 * 2**20, first)
    monkeypatch.setenv("LAB_MAX_STORED_MB", "4")
    with pytest.raises(LabError, match="take 5 MB, at most 4 MB"):
        submit(store)
    monkeypatch.setenv("LAB_MAX_STORED_MB", "40")
    monkeypatch.setenv("LAB_MIN_FREE_MB", "999999999")
    with pytest.raises(LabError, match="nearly full"):
        submit(store)
    monkeypatch.setenv("LAB_MIN_FREE_MB", "lots")
    with pytest.raises(LabError, match="LAB_MIN_FREE_MB must be a whole number"):
        submit(store)
    assert len(store.comparisons(ME)) == 2


def test_limit_holds_when_many_submit_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_MAX_QUEUED", "6")
    refused: list[LabError] = []

    def one() -> None:
        try:
            submit(Store(store.home))
        except LabError as error:
            refused.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.runs(ME)) == 6
    assert len(refused) == 5
    assert len(list((store.home / "comparisons").iterdir())) == 3
