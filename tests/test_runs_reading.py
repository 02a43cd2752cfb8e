"""The store while things go on: metrics and logs of any length, many threads, many runs."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path

import pytest

import lab.jobs.folders
from lab.errors import LabError
from lab.runs import Store, default_home
from tests.test_runs import (
    ME,
    OTHER,
    plain_store,  # noqa: F401 - a fixture
    submit,
)


def test_one_store_in_many_threads(store: Store) -> None:
    cid = submit(store, seeds=list(range(10)))
    runs = store.comparison(ME, cid).runs
    failures: list[BaseException] = []

    def work(run_id: str) -> None:
        try:
            for _ in range(10):
                store.cancel(ME, run_id)
                store.retry(ME, run_id)
                store.runs(ME)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(run.id,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(r.position for r in store.runs(ME)) == list(range(1, 12))


def test_metrics(store: Store) -> None:
    run = store.comparison(ME, submit(store)).runs[1]
    assert store.metrics(ME, run.id) == []
    run.folder.mkdir(parents=True)
    path = run.folder / "metrics.jsonl"
    records = [{"step": n, "loss": 1 / (n + 1)} for n in range(1000)]
    again = [{"step": n, "loss": 5.0} for n in range(990, 1000)]  # done again after a resume
    text = "".join(json.dumps(r) + "\n" for r in records + again)
    path.write_text(text + 'torn\n[1]\n{"step": "x"}\n{"step": 1000, "lo')
    assert store.metrics(ME, run.id, points=5000)[-2:] == [{"step": 998, "loss": 5.0}, {"step": 999, "loss": 5.0}]
    few = store.metrics(ME, run.id, points=50)
    assert few[0] == records[0]
    assert 40 <= len(few) <= 52
    assert [r["step"] for r in few] == sorted(r["step"] for r in few)
    path.write_text(text)
    assert store.metrics(ME, run.id, points=50)[-1] == {"step": 999, "loss": 5.0}
    path.write_text('{"step": 1, "loss": NaN}\n')
    assert store.metrics(ME, run.id) == [{"step": 1, "loss": None}]
    path.write_bytes(b"".join(b'{"step": %d, "loss": 0.123456789012345}\n' % n for n in range(200_000)))
    began = time.process_time()
    long = store.metrics(ME, run.id, points=300)
    assert time.process_time() - began < 1.0  # sampled: reading all of it would be seconds
    assert (long[0]["step"], long[-1]["step"]) == (0, 199_999)
    gaps = [b["step"] - a["step"] for a, b in itertools.pairwise(long)]
    assert max(gaps) < 3 * 200_000 / 300


def test_log_tail(store: Store) -> None:
    run = store.comparison(ME, submit(store)).runs[1]
    assert store.log_tail(ME, run.id) == ""
    run.folder.mkdir(parents=True)
    lines = "".join(f"line {n}\n" for n in range(100_000))
    bar = "\r  1%|  |\r 50%|= |\r100%|==|\n"
    code = lab.jobs.folders.__file__
    (run.folder / "log.txt").write_bytes(
        (lines + bar + f"\x1b[31m{store.home}/x\x1b[0m {code}\n\xff").encode("latin-1")
    )
    shown = store.log_tail(ME, run.id, lines=4).split("\n")
    assert shown == ["line 99999", "100%|==|", "$LAB_HOME/x ./lab/jobs/folders.py", "�"]
    assert len(store.log_tail(ME, run.id, lines=10**9).split("\n")) <= 1000


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "a" / ".." / "b"))
    assert default_home() == tmp_path / "b"
    assert Store().home == tmp_path / "b"
    assert (tmp_path / "b").stat().st_mode & 0o077 == 0  # other people's pictures
    monkeypatch.delenv("LAB_HOME")
    assert not default_home().is_relative_to(Path.cwd())
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="cannot write to its folder"):
        Store(tmp_path / "file")


def test_a_thousand_runs(store: Store) -> None:
    """Listing stays quick: measured against one submission's own cost it would hide, so in CPU time, with room."""
    cid = submit(store)
    with store._table.transaction():
        for n in range(1000):
            store._table.write(
                "INSERT INTO runs (id, comparison, owner, task, method, seed, knobs, created, queued) "
                "VALUES (?, ?, ?, 'toy', 'lora', ?, '{\"r\": 4}', 0, 0)",
                *(f"{n:024x}", cid, ME if n % 2 else OTHER, n),
            )
    times = []
    for _ in range(5):
        began = time.process_time()
        assert len(store.runs(ME)) == 502
        times.append(time.process_time() - began)
    assert min(times) < 0.2
    assert store._table.claim("w") is not None
