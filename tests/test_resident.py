"""The process that does several runs: each as in a process of its own, and safe as one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.jobs import BACKENDS, kept, processes
from lab.jobs.local import Local
from lab.jobs.resident import Resident
from lab.jobs.table import Table
from lab.jobs.worker import Worker
from lab.runs import Store
from tests import queue_task
from tests import small_sdxl as small
from tests.queue_helpers import ME, PATIENCE, alive, at_step, drain, ended, submit, wait, worker_pid
from tests.queue_helpers import queue_home as queue_home
from tests.queue_helpers import queue_store as queue_store


@pytest.fixture(autouse=True)
def resident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_RESIDENT", "1")
    monkeypatch.setattr(kept, "code_version", lambda: 1)  # whoever edits the lab while the tests run


@pytest.fixture
def local() -> Iterator[Local]:
    backend = Local()
    yield backend
    backend.rest()


def begin(home: Path, local: Local) -> Any:
    """Start the queue's next run: (its folder, the attempt)."""
    worker = Worker(home, BACKENDS["local"], "main")
    worker.table = Table(home)
    row = worker.table.claim(worker.name)
    assert row is not None
    orders = worker._orders(row)
    worker._write_orders(row, orders)
    return orders.folder, local.start(orders)


def end(home: Path, local: Local) -> tuple[Path, int]:
    """Do the queue's next run."""
    folder, attempt = begin(home, local)
    return folder, wait(lambda: (code := attempt.poll()) is not None and (code,), "its end", 3 * PATIENCE)[0]


def pid(folder: Path) -> int:
    return int((folder / "pid").read_text())


# -- the same results ------------------------------------------------------------------------------------
METHODS: dict[str, Any] = {"bitfit": {}, "pissa": {"dropout": 0.2}}


def written(folder: Path) -> dict[str, bytes]:
    """What a run made, but for times and memory."""
    kept = [p for part in ("adapter", "samples", "previews") for p in (folder / part).glob("*")]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k not in MEASURED}
    told = {"losses": json.dumps(losses).encode(), "result": json.dumps(result).encode()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept} | told


MEASURED = ("train_seconds", "sample_seconds", "peak_memory_bytes", "preflight")


def send(store: Store, **changes: Any) -> None:
    store.submit(ME, "subject", small.spec(**changes), small.pictures())


def test_a_used_process_gives_what_a_new_one_gives(
    store: Store, home: Path, small_sdxl: Any, local: Local, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Bit for bit, after a run that failed in the middle of attaching, and one that was cancelled in training."""
    monkeypatch.setenv("LAB_EXTRA_TASKS", "tests.queue_small_sdxl")
    monkeypatch.setenv("SMALL_SDXL", small_sdxl.source)
    changes = {"methods": METHODS, "unrelated_prompts": ["a dog"], "preview_every": 2}

    monkeypatch.setenv("LAB_RESIDENT", "0")  # forked: every run begins with imports alone
    send(store, **changes)
    new = [end(home, local) for _ in range(1 + len(METHODS))]
    monkeypatch.setenv("LAB_RESIDENT", "1")

    send(store, methods={"nora": {"r_outer": 80}})  # wider than some layers
    failed = [end(home, local) for _ in range(2)]
    send(store, methods={"dora": {}}, steps=5000, text_encoder=True, gradient_checkpointing=True)
    end(home, local)
    cut, attempt = begin(home, local)
    wait(lambda: (cut / "metrics.jsonl").exists() and (cut / "metrics.jsonl").read_text(), "training", 2 * PATIENCE)
    attempt.stop()
    code = wait(lambda: (code := attempt.poll()) is not None and (code,), "its end")[0]
    send(store, **changes)
    used = [end(home, local) for _ in range(1 + len(METHODS))]

    assert [code for _, code in failed] == [0, 1]
    assert code == 3
    assert json.loads((cut / "outcome.json").read_text())["state"] == "cancelled"
    assert {pid(folder) for folder, _ in (*failed, (cut, code), *used)} == {local._kept.process.pid}
    assert not (told := capfd.readouterr().err.partition("resident: ")[2]), told  # neither process nor base was renewed
    for (a, first), (b, second) in zip(new[1:], used[1:], strict=True):
        assert (a.name, first) == (b.name, second) == (b.name, 0)
        one, other = written(a), written(b)
        assert one.keys() == other.keys()
        assert "adapter/adapter_model.safetensors" in one
        assert [name for name in one if one[name] != other[name]] == [], a.name
    sheets = [sorted((folders[0][0] / "samples").iterdir()) for folders in (new, used)]
    assert [p.read_bytes() for p in sheets[0]] == [p.read_bytes() for p in sheets[1]]


def test_few_shot_runs_share_the_model(
    store: Store, home: Path, local: Local, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.delenv("LAB_EXTRA_TASKS")
    spec = {"dataset": "openmoji", "methods": {"full": {}, "lora": {}}, "shots": [1], "seeds": [1], "steps": 4}

    def results() -> list[dict[str, bytes]]:
        store.submit(ME, "fewshot", spec, [])
        done = [end(home, local) for _ in spec["methods"]]
        assert [code for _, code in done] == [0, 0]
        return [{p.name: p.read_bytes() for p in f.glob("shots-1/**/*.safetensors")} for f, _ in done]

    used = results()
    local.rest()
    monkeypatch.setenv("LAB_RESIDENT", "0")
    assert [sorted(names) for names in used] == [
        ["state.safetensors"],
        ["adapter_model.safetensors", "state.safetensors"],
    ]
    assert results() == used
    assert "resident: " not in capfd.readouterr().err


# -- as safe as a process of its own ---------------------------------------------------------------------
def test_one_process_does_them_all_and_each_has_its_own_log(store: Store, home: Path, local: Local) -> None:
    submit(store, methods={"lora": {"do": "error"}, "nora": {}, "dora": {"do": "refuse"}})
    done = [end(home, local) for _ in range(4)]
    assert [code for _, code in done] == [0, 1, 0, 1]
    assert len({pid(folder) for folder, _ in done}) == 1
    for folder, _ in done:
        log = (folder / "log.txt").read_text()
        assert log.count("--- attempt 1") == 1
        assert ("frobnicator" in log) == (folder.name == "lora-s0")
        assert ("same wall" in log) == (folder.name == "dora-s0")


@pytest.mark.parametrize(("how", "code"), [("kill", -9), ("segfault", -11), ("exit", 7)])
def test_what_kills_the_process_costs_one_attempt(store: Store, home: Path, local: Local, how: str, code: int) -> None:
    submit(store, methods={"lora": {"do": how}})
    end(home, local)
    folder, got = end(home, local)
    assert got == code
    assert ("Segmentation fault" in (folder / "log.txt").read_text()) == (how == "segfault")
    submit(store)
    end(home, local)
    after, got = end(home, local)
    assert got == 0
    assert pid(after) != pid(folder)
    assert json.loads((after / "result.json").read_text())["value"] == queue_task.expected(0, 6)


def test_a_crash_is_resumed_by_the_worker(store: Store, home: Path) -> None:
    run = submit(store, methods={"lora": {"do": "segfault", "once": True}})[1]
    drain(home)
    found = store.run(ME, run.id)
    assert (found.state, found.attempt) == ("done", 2)
    assert found.result()["began_at"] == 4
    assert found.result()["value"] == queue_task.expected(0, 6)


def test_cancel_ends_the_run_and_not_the_process(store: Store, home: Path, local: Local) -> None:
    submit(store, steps=5000, seconds=0.01)
    end(home, local)
    folder, attempt = begin(home, local)
    wait(lambda: (folder / "metrics.jsonl").exists(), "its beginning")
    began = time.monotonic()
    attempt.stop()
    assert wait(lambda: attempt.poll(), "its end") == 3
    assert time.monotonic() - began < 2
    submit(store)
    end(home, local)
    assert pid(end(home, local)[0]) == pid(folder)


def test_what_does_not_listen_is_killed(store: Store, home: Path) -> None:
    run = submit(store, methods={"lora": {"do": "deaf"}})[1]
    from lab.jobs import ensure_worker

    ensure_worker(home)
    helper = int(wait(lambda: (run.folder / "helper").exists() and (run.folder / "helper").read_text(), "the helper"))
    began = time.monotonic()
    store.cancel(ME, run.id)
    assert ended(store, run).state == "cancelled"
    assert time.monotonic() - began < 2
    assert wait(lambda: not alive(helper), "the helper's end")


def test_what_a_run_leaves_running_is_ended_before_the_next(store: Store, home: Path, local: Local, capfd: Any) -> None:
    submit(store, methods={"lora": {"do": "leave"}, "nora": {}})
    done = [end(home, local) for _ in range(3)]
    assert [code for _, code in done] == [0, 0, 0]
    assert not alive(int((done[1][0] / "helper").read_text()))
    assert "a new process: programs were left running" in capfd.readouterr().err
    assert json.loads((done[2][0] / "result.json").read_text())["value"] == queue_task.expected(0, 6)


def test_it_ends_with_its_worker_and_at_rest(store: Store, home: Path, local: Local) -> None:
    from lab.jobs import ensure_worker

    submit(store)
    own = pid(end(home, local)[0])
    assert alive(own)
    local.rest()
    assert not alive(own)
    run = submit(store, steps=5000, seconds=0.05)[1]
    ensure_worker(home)
    at_step(store, run, 1)
    worker, its = worker_pid(home), pid(run.folder)
    os.kill(worker, signal.SIGKILL)
    wait(lambda: not alive(its), "its end")


@pytest.mark.parametrize(
    ("environment", "device", "so"),
    [
        ({"LAB_RESIDENT": "1"}, "main", True),
        ({"LAB_RESIDENT": "0"}, "3", False),
        ({}, "main", False),
        ({}, "3", True),
        ({"LAB_DEVICE": "cuda:1"}, "main", True),
        ({"LAB_DEVICE": "cpu"}, "3", False),
    ],
)
def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, so: bool) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("LAB_RESIDENT", "LAB_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Resident.possible(device) is so


def test_members_of_a_group() -> None:
    assert os.getpid() not in processes.members()
