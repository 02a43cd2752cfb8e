"""The queue on a Ray cluster: the same worker here, each attempt a Ray job there.

    pip install "ray[default]"
    LAB_BACKEND=ray RAY_ADDRESS=http://head:8265 LAB_HOME=/shared/nora-lab python app.py

Every node sees LAB_HOME under the same path (or under LAB_RAY_HOME) and has the lab's folder and its packages, at
the same path or at LAB_RAY_ROOT, run by LAB_RAY_PYTHON (default `python`). A job gets LAB_RAY_GPUS GPUs (default 1;
0 on a cluster without) and is given to Ray LAB_RAY_JOBS at a time (default 4); Ray queues what does not fit.

Our table stays the only truth: a Ray head that is restarted forgets its jobs, and their runs are resumed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.jobs import Attempt, Orders, register

ROOT = Path(__file__).resolve().parents[2]
MISSING = 'LAB_BACKEND=ray needs Ray, which is not installed: run pip install "ray[default]".'
POLL_SECONDS = 0.5
LOST_SECONDS = 60.0  # without an answer: the head may be starting anew
KILLED = 137  # 128 + SIGKILL: counted as a crash, so the run is resumed
PASSED_ON = ("LAB_EXTRA_TASKS", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")


def submission_id(orders: Orders) -> str:
    """The Ray job's name: known from the row alone, so that a new worker finds the jobs of the last."""
    return f"nora-lab-{orders.token}"


def entrypoint(orders: Orders) -> str:
    """The shell command that Ray runs: the local backend's own, its output appended to the run's log."""
    home = Path(os.environ.get("LAB_RAY_HOME") or orders.home)
    log = home / orders.folder.relative_to(orders.home) / "log.txt"
    root, python = os.environ.get("LAB_RAY_ROOT") or str(ROOT), os.environ.get("LAB_RAY_PYTHON") or "python"
    command = shlex.join([python, "-m", "lab.jobs.child", orders.run_id])
    return f"cd {shlex.quote(root)} && exec {command} >> {shlex.quote(str(log))} 2>&1"


class RayAttempt:
    def __init__(self, connect: Callable[[], Any], id: str) -> None:
        self._connect, self._id = connect, id
        self._asked = 0.0
        self._heard = time.monotonic()

    def poll(self) -> int | None:
        now = time.monotonic()
        if now - self._asked < POLL_SECONDS:
            return None
        self._asked = now
        try:
            info = self._connect().get_job_info(self._id)
        except Exception as error:  # Ray raises RuntimeError, ConnectionError and those of requests
            return KILLED if _unknown(error) or now - self._heard > LOST_SECONDS else None
        self._heard = now
        return _exit_code(info)

    def stop(self) -> None:
        with contextlib.suppress(Exception):  # not reachable or gone: `poll` finds out which
            self._connect().stop_job(self._id)  # SIGTERM to the job's processes, SIGKILL three seconds later

    def kill(self) -> None:
        self.stop()


def _exit_code(info: Any) -> int | None:
    status = str(getattr(info.status, "value", info.status))
    if status in ("PENDING", "RUNNING"):
        return None
    code = getattr(info, "driver_exit_code", None)
    if status == "SUCCEEDED":
        return 0
    return int(code) if status == "FAILED" and code is not None else KILLED  # stopped, or its node is gone


def _unknown(error: Exception) -> bool:
    """Whether the head answered that it has no such job (it was restarted)."""
    return "404" in str(error) or "does not exist" in str(error)


class Ray:
    id = "ray"
    name = "A Ray cluster"
    detached = True
    order = 10

    def __init__(self, connect: Callable[[], Any] | None = None) -> None:
        self._connect = connect or _connect
        self._client: Any = None

    def devices(self) -> Sequence[str]:
        return ["cluster"]

    def slots(self) -> int:
        return max(1, _number("LAB_RAY_JOBS", 4))

    def check(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise LabError(MISSING)

    def client(self) -> Any:
        if self._client is None:
            try:
                self._client = self._connect()
            except LabError:
                raise
            except Exception as error:
                raise LabError(
                    f"The Ray cluster does not answer ({_address()}): is it up, is RAY_ADDRESS right?"
                ) from error
        return self._client

    def start(self, orders: Orders) -> Attempt:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        home = os.environ.get("LAB_RAY_HOME") or str(orders.home)
        client, id = self.client(), submission_id(orders)
        try:
            client.submit_job(
                entrypoint=entrypoint(orders),
                submission_id=id,
                runtime_env={"env_vars": environment | {"LAB_HOME": home, "PYTHONUNBUFFERED": "1"}},
                entrypoint_num_gpus=_number("LAB_RAY_GPUS", 1),
                metadata={"run": orders.run_id, "attempt": str(orders.attempt)},
            )
        except Exception as error:
            self._client = None
            said = " ".join(str(error).split())[:200]
            raise LabError(f"The Ray cluster took no job ({_address()}): {said}.") from error
        return RayAttempt(self.client, id)

    def find(self, orders: Orders) -> Attempt | None:
        """The job by its name. A head that does not answer may still have it: that too is an attempt to wait for."""
        id = submission_id(orders)
        try:
            self.client().get_job_info(id)
        except Exception as error:
            if _unknown(error):
                return None
        return RayAttempt(self.client, id)

    def rest(self) -> None:
        """Nothing is kept ready here."""


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"


def _connect() -> Any:
    try:
        submission = importlib.import_module("ray.job_submission")  # optional: not among the lab's requirements
    except ImportError:
        raise LabError(MISSING) from None
    return submission.JobSubmissionClient(_address())


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "").strip()
    if given and not given.isdecimal():
        raise LabError(f"{name} must be a whole number, got '{given}'.")
    return int(given) if given else default


register(Ray())
