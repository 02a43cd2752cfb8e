"""The Ray backend against a client that keeps Ray's promises: it runs the submitted shell command, for real, here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lab.errors import LabError
from lab.jobs import BACKENDS, Orders, ensure_worker
from lab.jobs.ray import LOST_SECONDS, Ray, RayAttempt, entrypoint, submission_id
from lab.jobs.worker import Worker
from lab.runs import Run, Store
from tests import queue_task

ME = "me"


class Client:
    """`ray.job_submission.JobSubmissionClient`, as far as the lab uses it (Ray 2.60)."""

    def __init__(self) -> None:
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}
        self.submitted: list[dict[str, Any]] = []
        self.down = False

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], **more: Any) -> str:
        if self.down:
            raise ConnectionError("Failed to connect to Ray at address: http://head:8265")
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        self.submitted.append(more | {"entrypoint": entrypoint, "id": submission_id, "env": runtime_env["env_vars"]})
        environment = {"PATH": os.environ["PATH"]} | runtime_env["env_vars"]  # nothing else of ours reaches a cluster
        self.jobs[submission_id] = subprocess.Popen(entrypoint, shell=True, env=environment, start_new_session=True)
        return submission_id

    def get_job_info(self, submission_id: str) -> Any:
        if self.down:
            raise ConnectionError("Failed to connect to Ray at address: http://head:8265")
        if submission_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist")
        code = self.jobs[submission_id].poll()
        if code is None:
            return SimpleNamespace(status="RUNNING", driver_exit_code=None)
        return SimpleNamespace(status="FAILED" if code else "SUCCEEDED", driver_exit_code=code)

    def stop_job(self, submission_id: str) -> bool:
        os.killpg(self.jobs[submission_id].pid, signal.SIGTERM)
        return True


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    for process in client.jobs.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LAB_EXTRA_TASKS", "tests.queue_task")
    monkeypatch.setenv("LAB_MIN_FREE_MB", "0")
    monkeypatch.setenv("LAB_RAY_PYTHON", sys.executable)
    return Store(tmp_path / "ho me")  # a space: the command goes through a shell


def submit(store: Store, **spec: Any) -> list[Run]:
    return store.comparison(ME, store.submit(ME, "toy", spec, [Image.new("RGB", (20, 20))])).runs


def start(store: Store, client: Client) -> tuple[Worker, threading.Thread]:
    worker = Worker(store.home, Ray(lambda: client), "cluster")
    thread = threading.Thread(target=worker.serve, kwargs={"drain": True}, daemon=True)
    thread.start()
    return worker, thread


def wait(test: Any, seconds: float = 45.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := test()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_runs_are_done_side_by_side(store: Store, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_RAY_JOBS", "3")
    monkeypatch.setenv("LAB_RAY_GPUS", "2")
    runs = submit(store, seeds=[0, 1], steps=30, seconds=0.02)
    start(store, client)[1].join(60)
    runs = [store.run(ME, run.id) for run in runs]
    assert [run.state for run in runs] == ["done"] * 3
    assert [run.result()["value"] for run in runs[1:]] == [queue_task.expected(s, 30) for s in (0, 1)]
    assert runs[2].started < runs[1].finished
    assert {job["entrypoint_num_gpus"] for job in client.submitted} == {2}
    assert {job["env"]["LAB_HOME"] for job in client.submitted} == {str(store.home)}
    assert store.log_tail(ME, runs[1].id).startswith("--- attempt 1")


def test_cancel_and_failure(store: Store, client: Client) -> None:
    base, long, bad = submit(store, steps=5000, seconds=0.05, methods={"lora": {}, "nora": {"do": "refuse"}})
    _, thread = start(store, client)
    wait(lambda: store.run(ME, long.id).step >= 3)
    store.cancel(ME, long.id)
    thread.join(60)
    assert store.run(ME, base.id).state == "done"
    assert store.run(ME, long.id).state == "cancelled"
    assert store.run(ME, bad.id).message == "The pictures are all of the same wall: send others."


def test_job_that_dies_is_resumed(store: Store, client: Client) -> None:
    run = submit(store, steps=30, methods={"lora": {"do": "kill", "at": 20, "once": True}})[1]
    start(store, client)[1].join(60)
    done = store.run(ME, run.id)
    assert (done.state, done.attempt) == ("done", 2)
    assert done.result() == {"value": queue_task.expected(0, 30), "began_at": 20, "nan": None}


def test_jobs_outlive_the_worker_and_the_next_finds_them(store: Store, client: Client) -> None:
    run = submit(store, steps=60, seconds=0.05)[1]
    first, thread = start(store, client)
    wait(lambda: store.run(ME, run.id).step >= 5)
    first.stopping = True
    thread.join(20)
    assert store.run(ME, run.id).state == "running"
    start(store, client)[1].join(60)
    done = store.run(ME, run.id)
    assert (done.state, done.attempt, done.result()["began_at"]) == ("done", 1, 0)
    assert len(client.submitted) == 2  # base and this one, once each


def test_head_that_forgot_its_jobs(store: Store, client: Client) -> None:
    """The job still runs, nobody knows of it: the run is given out again, and the lost one ends itself."""
    hangs = {"do": "deaf", "at": 10, "once": True}  # it would not end in this test's time
    run = submit(store, steps=20, methods={"lora": hangs})[1]
    _, thread = start(store, client)
    wait(lambda: store.run(ME, run.id).step >= 10)
    lost = next(job for id, job in client.jobs.items() if run.id in id)
    client.jobs = {id: job for id, job in client.jobs.items() if job is not lost}
    wait(lambda: store.run(ME, run.id).attempt == 2)
    assert lost.wait(20) != 0
    thread.join(60)
    assert store.run(ME, run.id).result()["value"] == queue_task.expected(0, 20)
    assert [m["step"] for m in store.metrics(ME, run.id)] == list(range(20))


def test_cluster_that_does_not_answer(store: Store, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.jobs.worker.LATER_SECONDS", 0.5)
    client.down = True
    base = submit(store)[0]
    worker, thread = start(store, client)
    waiting = wait(lambda: (r := store.run(ME, base.id)).message and r)
    assert (waiting.state, waiting.attempt) == ("queued", 0)  # it does not count
    assert waiting.message.startswith("The Ray cluster took no job (http://127.0.0.1:8265): Failed to connect")
    client.down = False
    thread.join(60)
    assert store.run(ME, base.id).state == "done"
    assert not worker.stopping


def orders(tmp_path: Path) -> Orders:
    return Orders(tmp_path, "a" * 24, 2, "a" * 24 + "-2-123", tmp_path / "comparisons" / "c" / "runs" / "x", "cluster")


def test_unreachable_head_is_waited_for_but_not_for_ever(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.down = True
    attempt = Ray(lambda: client).find(orders(tmp_path))
    assert isinstance(attempt, RayAttempt)  # the job may well be running
    assert attempt.poll() is None
    attempt._asked = attempt._heard = time.monotonic() - LOST_SECONDS - 1
    assert attempt.poll() == 137
    client.down = False
    assert Ray(lambda: client).find(orders(tmp_path)) is None


def test_command_line_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_RAY_HOME", "/mnt/shared lab")
    monkeypatch.setenv("LAB_RAY_ROOT", "/opt/lab")
    monkeypatch.setenv("LAB_RAY_PYTHON", "/opt/lab/.venv/bin/python")
    assert entrypoint(orders(tmp_path)) == (
        f"cd /opt/lab && exec /opt/lab/.venv/bin/python -m lab.jobs.child {'a' * 24} "
        ">> '/mnt/shared lab/comparisons/c/runs/x/log.txt' 2>&1"
    )
    assert submission_id(orders(tmp_path)) == f"nora-lab-{'a' * 24}-2-123"


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_BACKEND", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(LabError, match=r'not installed: run pip install "ray\[default\]"'):
        BACKENDS["ray"].client()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match=r'not installed: run pip install "ray\[default\]"'):
        ensure_worker(tmp_path)
    monkeypatch.setenv("LAB_RAY_JOBS", "many")
    with pytest.raises(LabError, match="LAB_RAY_JOBS must be a whole number"):
        BACKENDS["ray"].slots()
