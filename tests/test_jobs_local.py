"""The local backend: processes forked from one that has imported everything, and a worker for each GPU."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from lab.jobs import BACKENDS, Orders, ensure_worker, kept, warm
from lab.jobs.local import Local
from lab.jobs.table import Table
from lab.jobs.worker import Worker
from lab.runs import Run, Store
from tests import queue_task
from tests.queue_helpers import ME, alive, at_step, child_pid, drain, queue_home, queue_store, submit, wait  # noqa: F401 - fixtures


def test_forked_and_started_processes_do_the_same(store: Store, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = submit(store)[1]
    drain(home)
    monkeypatch.setenv("LAB_WARM", "0")
    started = submit(store)[1]
    drain(home)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # a worker of a GPU: imports happen before it is chosen
    other = submit(store)[1]
    drain(home)
    results = [store.run(ME, run.id).result() for run in (forked, started, other)]
    assert results[0] == results[1] == results[2]
    assert results[0]["value"] == queue_task.expected(0, 6)


def orders_for(home: Path, run: Run) -> Orders:
    worker = Worker(home, BACKENDS["local"], "main")
    worker.table = Table(home)
    row = worker.table.claim(worker.name)
    assert row["id"] == run.id
    orders = worker._orders(row)
    worker._write_orders(row, orders)
    return orders


def test_cancel_while_everything_is_being_imported(store: Store, home: Path, tmp_path: Path) -> None:
    orders = orders_for(home, submit(store)[0])
    nursery = warm.Nursery(home)
    attempt = nursery.begin(orders)
    attempt.stop()  # it has not even said that it began
    assert wait(lambda: attempt.poll(), "the end") == -signal.SIGKILL
    assert not nursery.fit(home)
    nursery.close()


def test_new_code_gets_a_new_process(store: Store, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nursery = warm.Nursery(home)
    assert nursery.fit(home)
    assert not nursery.fit(home / "elsewhere")
    monkeypatch.setattr(kept, "code_version", lambda: nursery.version + 1)
    assert not nursery.fit(home)
    nursery.close()
    assert not alive(nursery.process.pid)


def test_dead_process_is_replaced(store: Store, home: Path) -> None:
    local = Local()
    orders = orders_for(home, submit(store)[0])
    attempts = []
    for _ in range(2):
        attempt = local.start(orders)
        assert wait(lambda attempt=attempt: attempt.poll() is not None, "the end")
        attempts.append(attempt.poll())
        local._kept.process.kill()
        local._kept.process.wait()
    local.rest()
    assert attempts == [0, 0]
    assert json.loads((orders.folder / "outcome.json").read_text())["state"] == "done"


# -- several devices ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("visible", "devices"),
    [("", ["main"]), ("-1", ["main"]), ("0,1", ["0", "1"]), (" 3 ", ["3"]), ("GPU-a1", ["GPU-a1"])],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, visible: str, devices: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Local().devices() == devices


def test_a_worker_for_each_gpu(store: Store, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    runs = submit(store, steps=5000, seconds=0.05, seeds=[0, 1])[1:]
    assert ensure_worker(home) == 2
    seen = set()
    for run in runs:
        at_step(store, run, 1)  # both at the same time
        environment = Path(f"/proc/{child_pid(run)}/environ").read_text().split("\0")
        seen |= {line for line in environment if line.startswith("CUDA_VISIBLE_DEVICES=")}
    assert seen == {"CUDA_VISIBLE_DEVICES=4", "CUDA_VISIBLE_DEVICES=5"}
