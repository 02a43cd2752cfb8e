"""Chromium on the real page, started as a visitor's server would be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.jobs import processes

ROOT = Path(__file__).resolve().parents[2]
# Without these, Chromium looks for its maker's servers at every start.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """The browser to drive: LAB_CHROMIUM, or the first that is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("LAB_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def marks(timeout_s: int) -> list[pytest.MarkDecorator]:
    """What every module of browser tests is marked with."""
    return [
        pytest.mark.browser,
        pytest.mark.timeout(timeout_s),
        pytest.mark.skipif(chromium() is None, reason="no Chromium is installed (set LAB_CHROMIUM to its path)"),
    ]


@contextmanager
def server(home: Path, **more: str) -> Iterator[str]:
    """`python app.py` on a free port over this home; its address. Page and worker end with the block. `more`: variables
    of its environment."""
    environment = os.environ | {
        "LAB_HOME": str(home),
        "LAB_MIN_FREE_MB": "0",
        "GRADIO_TEMP_DIR": str(home.parent / "cache"),
        **more,
    }
    command = [sys.executable, "-u", "app.py", "--host", "127.0.0.1", "--port", "0"]
    page = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout is not None
        found = re.search(r"http://\S+", page.stdout.readline())
        assert found, "the page did not start"
        yield found.group().replace("localhost", "127.0.0.1")
    finally:
        page.terminate()
        page.wait(timeout=20)
        for lock in home.glob("worker-*.lock"):
            if pid := processes.holder(lock):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; each `new_context()` is another visitor."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=FLAGS, headless=True)
        yield found
        found.close()
