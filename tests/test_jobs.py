"""The queue with real processes, really killed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.jobs import BACKENDS, child, ensure_worker, processes, workers
from lab.jobs.table import Table
from lab.jobs.worker import Worker
from lab.runs import Store
from lab.tasks import Cancelled
from tests import queue_task
from tests.queue_helpers import (  # noqa: F401 - fixtures
    ME,
    alive,
    at_step,
    child_pid,
    drain,
    ended,
    queue_home,
    queue_store,
    submit,
    wait,
    worker_pid,
)


def test_runs_are_done_one_after_another_the_base_first(store: Store, home: Path) -> None:
    runs = submit(store, methods={"lora": {}, "nora": {}}, seeds=[0, 1])
    drain(home)
    runs = store.comparison(ME, runs[0].comparison).runs
    assert [r.state for r in runs] == ["done"] * 5
    assert [r.method for r in sorted(runs, key=lambda r: r.started)] == ["base", "lora", "lora", "nora", "nora"]
    assert all(a.finished <= b.started for a, b in itertools.pairwise(runs))
    assert runs[0].result() == {"value": 0, "pictures": 3}
    assert runs[2].result() == {"value": queue_task.expected(1, 6), "began_at": 0, "nan": None}
    assert [m["step"] for m in store.metrics(ME, runs[1].id)] == list(range(6))
    assert store.log_tail(ME, runs[1].id).startswith("--- attempt 1")
    assert store.comparison(ME, runs[0].comparison).state == "done"
    assert store.comparison(ME, runs[0].comparison).bytes > 500
    assert not list((home / "attempts").iterdir())


def test_progress_reaches_the_row(store: Store, home: Path) -> None:
    run = submit(store, steps=400, seconds=0.02)[1]
    ensure_worker(home)
    seen = at_step(store, run, 60)
    assert (seen.phase, seen.steps, seen.attempt) == ("training", 400, 1)
    assert 5 < seen.rate < 50  # 50 is what sleeping allows
    assert seen.eta_s == pytest.approx((400 - seen.step) / seen.rate, rel=0.01)
    assert time.time() - seen.heartbeat < 10
    adjusted = int(Path(f"/proc/{child_pid(run)}/oom_score_adj").read_text())
    assert adjusted > int(Path("/proc/self/oom_score_adj").read_text())


@pytest.mark.parametrize("do", ["", "deaf"])
def test_cancel_within_two_seconds(store: Store, home: Path, do: str) -> None:
    knobs = {"do": do, "at": 4} if do else {}
    running, waiting = submit(store, steps=5000, seconds=0.05, methods={"lora": knobs, "nora": {}})[1:]
    ensure_worker(home)
    at_step(store, running, 3)
    if do:
        wait(lambda: (running.folder / "helper").exists(), "the deaf run")
    pid = child_pid(running)
    began = time.monotonic()
    assert store.cancel(ME, waiting.id).state == "cancelled"  # at once
    assert store.cancel(ME, running.id).cancelling
    run = ended(store, running)
    assert time.monotonic() - began < 2.0
    assert (run.state, run.message, run.cancelling) == ("cancelled", "", False)
    assert not alive(pid)
    if do:
        wait(lambda: not alive(int((running.folder / "helper").read_text())), "the end of what it had started")


def test_killed_child_resumes_from_its_checkpoint(store: Store, home: Path) -> None:
    run = submit(store, steps=60, seconds=0.03)[1]
    ensure_worker(home)
    at_step(store, run, 20)
    os.kill(child_pid(run), signal.SIGKILL)
    done = ended(store, run)
    assert (done.state, done.attempt, done.message) == ("done", 2, "")
    assert done.result()["began_at"] >= 18
    assert done.result()["value"] == queue_task.expected(0, 60)
    assert [m["step"] for m in store.metrics(ME, run.id)] == list(range(60))


def test_killed_worker_takes_its_child_along_and_the_next_goes_on(store: Store, home: Path) -> None:
    run, after = submit(store, steps=60, seconds=0.03, seeds=[0, 1])[1:]
    ensure_worker(home)
    at_step(store, run, 20)
    first, pid = worker_pid(home), child_pid(run)
    os.kill(first, signal.SIGKILL)
    wait(lambda: not alive(pid), "the child's end")
    assert store.run(ME, run.id).state == "running"  # nobody is there to say otherwise
    assert wait(lambda: ensure_worker(home), "a new worker") == 1
    assert worker_pid(home) != first
    done = ended(store, run)
    assert (done.state, done.attempt) == ("done", 2)
    assert done.result()["value"] == queue_task.expected(0, 60)
    assert done.result()["began_at"] >= 18
    assert ended(store, after).attempt == 1


def test_page_killed_the_run_goes_on(store: Store, home: Path) -> None:
    run = submit(store, steps=60, seconds=0.03)[1]
    page = "import os, time; from lab.jobs import ensure_worker; from lab.runs import default_home; " + (
        "ensure_worker(default_home()); print('up', flush=True); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", page], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"up\n"
        at_step(store, run, 10)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the page and everything in its group
        process.communicate()
    done = ended(store, run)
    assert (done.state, done.attempt) == ("done", 1)
    assert ensure_worker(home) == 0  # the same worker still


def test_worker_told_to_end_puts_its_run_back(store: Store, home: Path) -> None:
    run = submit(store, steps=80, seconds=0.03)[1]
    ensure_worker(home)
    at_step(store, run, 20)
    os.kill(worker_pid(home), signal.SIGTERM)
    back = wait(lambda: (r := store.run(ME, run.id)).state == "queued" and r, "the run in the queue")
    assert (back.attempt, back.position) == (0, 1)  # does not count
    drain(home)
    assert store.run(ME, run.id).result()["value"] == queue_task.expected(0, 80)
    assert store.run(ME, run.id).result()["began_at"] >= 18


CRASHES = {
    "segfault": "The run crashed (segmentation fault), 3 times",
    "kill": "The run was stopped by the system, most likely out of memory, 3 times: choose a smaller batch",
}
REFUSALS = {
    "refuse": "The pictures are all of the same wall: send others.",
    "error": "The run stopped on an error (RuntimeError: the frobnicator); its log says where.",
    "full": "The disk is full",
    "limit": "The disk is full",
    "exit": "The run ended with exit code 7",
}


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), child.NO_MEMORY, "Memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), child.NO_MEMORY, "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), child.NO_MEMORY, "Memory ran out"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), child.DISK_FULL, "The disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), child.DISK_FULL, "The disk is full"),
        (SystemExit(0), child.FAILED, "The run stopped on an error (SystemExit: 0)"),
        (LabError("Two\nlines."), child.FAILED, "Two lines."),
        (LabError("This file is too large: the disk is full of them."), child.FAILED, "This file is too large"),
        (Cancelled(), child.CANCELLED, ""),
    ],
)
def test_reasons(tmp_path: Path, error: BaseException, code: int, sentence: str) -> None:
    given, message = child.explain(error, tmp_path)
    assert given == code
    assert message.startswith(sentence)
    if code == child.DISK_FULL:  # the same where it is only the cause of what arrives
        for outer in (RuntimeError("saving failed"), LabError("The disk is full: x could not be saved.")):
            outer.__cause__ = error
            assert child.explain(outer, tmp_path)[0] == code


def test_each_bad_end_is_one_sentence_and_the_queue_goes_on(store: Store, home: Path) -> None:
    runs = submit(store, methods={do: {"do": do} for do in CRASHES | REFUSALS} | {"last": {}})
    drain(home)
    by_method = {run.method: store.run(ME, run.id) for run in runs}
    assert by_method["last"].state == by_method["base"].state == "done"
    for do, sentence in (CRASHES | REFUSALS).items():
        run = by_method[do]
        assert (run.state, run.attempt) == ("failed", 3 if do in CRASHES else 1), do
        assert run.message.startswith(sentence), (do, run.message)
        assert "\n" not in run.message
        if do not in CRASHES | {"exit": 0, "limit": 0}:
            assert run.step == 3, do  # where it ended, not where it was last seen
        assert str(home) not in run.message + store.log_tail(ME, run.id)
        assert json.loads((run.folder / "checkpoint.json").read_text())[0] >= 2  # nothing saved is lost
    assert "misbehave" in store.log_tail(ME, by_method["segfault"].id)  # the stack
    assert "misbehave" in store.log_tail(ME, by_method["error"].id)
    assert store.comparison(ME, runs[0].comparison).state == "failed"


def test_failed_run_goes_on_after_retry(store: Store, home: Path) -> None:
    run = submit(store, methods={"lora": {"do": "full", "once": True}}, steps=10)[1]
    drain(home)
    assert store.run(ME, run.id).state == "failed"
    assert store.retry(ME, run.id).state == "queued"
    drain(home)
    done = store.run(ME, run.id)
    assert (done.state, done.message, done.attempt) == ("done", "", 1)
    assert done.result()["value"] == queue_task.expected(0, 10)
    assert done.result()["began_at"] == 4


def test_full_disk_is_written_down_with_the_room_kept_back(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = submit(store, methods={"lora": {"do": "full"}})
    finish, progress = Table.finish, Table.progress

    def no_progress(table: Table, *values: Any) -> None:
        if (home / "reserve").exists():
            raise sqlite3.OperationalError("database or disk is full")
        progress(table, *values)

    def full(table: Table, *values: Any, **more: Any) -> None:
        if (home / "reserve").exists():
            raise sqlite3.OperationalError("database or disk is full")
        finish(table, *values, **more)

    monkeypatch.setattr(Table, "finish", full)
    monkeypatch.setattr(Table, "progress", no_progress)
    worker = Worker(home, BACKENDS["local"], "main")
    worker.serve(drain=True)
    assert store.run(ME, base.id).state == "done"
    assert store.run(ME, run.id).message.startswith("The disk is full")


def test_interrupted_too_often_is_failed(store: Store, home: Path) -> None:
    run = submit(store)[1]
    for attempt in range(1, 4):
        while store._table.claim("local-main")["id"] != run.id:  # as workers do that are killed at once
            store._table.finish(store._table.running()[0]["id"], "done")
        drain_state = store.run(ME, run.id)
        assert (drain_state.state, drain_state.attempt) == ("running", attempt)
        worker = Worker(home, BACKENDS["local"], "main")
        worker.table = store._table
        worker._adopt("local-main")
    failed = store.run(ME, run.id)
    assert failed.state == "failed"
    assert failed.message.startswith("The run was interrupted (the computer or the worker stopped), 3 times")


def test_cancelled_while_nobody_works(store: Store, home: Path) -> None:
    run = submit(store, steps=5000, seconds=0.05)[1]
    ensure_worker(home)
    at_step(store, run, 3)
    os.kill(worker_pid(home), signal.SIGKILL)
    assert store.cancel(ME, run.id).cancelling
    drain(home)
    assert store.run(ME, run.id).state == "cancelled"


def test_result_that_nobody_wrote_down_is_not_done_again(store: Store, home: Path) -> None:
    base, run = submit(store)
    row = store._table.claim("local-main")
    token = Worker(home, BACKENDS["local"], "main")._orders(row).token
    base.folder.mkdir(parents=True)
    (base.folder / "result.json").write_text("{}")
    (base.folder / "outcome.json").write_text(json.dumps({"token": token, "state": "done", "message": ""}))
    drain(home)
    assert store.run(ME, base.id).state == "done"
    assert store.run(ME, base.id).result() == {}  # the task would have written more
    assert store.run(ME, run.id).state == "done"


def test_run_of_a_worker_that_is_no_more_is_taken_over(store: Store, home: Path) -> None:
    base = submit(store)[0]
    store._table.claim("local-7")  # a GPU that was taken out
    drain(home)
    assert store.run(ME, base.id).state == "done"
    assert store.run(ME, base.id).attempt == 2


def test_one_worker_a_device(store: Store, home: Path) -> None:
    ensure_worker(home)
    pid = worker_pid(home)
    assert ensure_worker(home) == 0
    drain(home)  # another worker leaves at once
    assert worker_pid(home) == pid
    assert workers.status(home, BACKENDS["local"]) == [{"device": "main", "running": True, "pid": pid}]
    assert os.getsid(pid) == pid  # detached


def test_worker_leaves_when_idle_and_none_is_left_waiting(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_WORKER_IDLE_SECONDS", "0")
    ensure_worker(home)
    wait(lambda: not processes.held(workers.lock_path(home, "local", "main")), "the worker's leave")
    run = submit(store)[1]
    wait(lambda: ensure_worker(home) or store.run(ME, run.id).over, "a worker")
    assert ended(store, run).state == "done"


def test_unknown_backend_is_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_BACKEND", "slurm")
    with pytest.raises(LabError, match="Unknown queue backend 'slurm'"):
        ensure_worker(home)
