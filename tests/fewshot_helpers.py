"""A LAB_HOME for each few-shot test, and specs of a task small enough to run whole."""

from __future__ import annotations

import pytest

from lab.tasks import TASKS, _fewshot_run
from tests import micro_clip

TASK = TASKS["fewshot"]
SMALL = {"steps": 4, "batch": 6, "shots": [1, 2], "seeds": [1]}


@pytest.fixture(autouse=True)
def fewshot_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    for cached in (_fewshot_run.pictures, _fewshot_run.model, _fewshot_run._episode):
        cached.cache_clear()


def spec(**given) -> dict:
    """A spec of the micro task; what it says of classes fits the squares."""
    return TASK.check(SMALL | given) | {"classes": list(micro_clip.CLASSES), "template": "a {}"}
