"""A base from the Hub in a real browser: how far its download is, and one sentence where there is no Hub."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser import browser, marks, server
from tests.hub_server import Hub, serving

PATIENCE_MS = 120_000
RUNNING_S = 420  # a quarter of a minute on a free machine of two cores, most of it the download
SECONDS_A_MB = 2.0  # of files from 0.6 to 4.1 MB, fetched at once: they end one after another

pytestmark = marks(600)


@pytest.fixture(scope="module")
def hub(small_sdxl: Any) -> Iterator[Hub]:
    """A slow one with two models."""
    models = dict.fromkeys(("owner/small", "owner/other"), Path(small_sdxl.source))
    with serving(Hub(models, slow=SECONDS_A_MB)) as found:
        yield found


@pytest.fixture(scope="module")
def address(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page whose visitors may name any model of that Hub."""
    home = tmp_path_factory.mktemp("home")
    hubs = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(home.parent / "models"), "LAB_HUB_BASES": "1"}
    with server(home, **hubs) as found:
        yield found


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Any]:
    """The Subject tab with three pictures and as little as can be trained."""
    with browser() as chrome:
        opened: Any = chrome.new_context(viewport={"width": 1280, "height": 900}).new_page()
        opened.set_default_timeout(PATIENCE_MS)
        opened.goto(address)
        files = [tmp_path / f"{i}.png" for i in range(3)]
        for number, file in enumerate(files):
            Image.new("RGB", (32, 32), (60 * number, 90, 120)).save(file)
        opened.locator("#upload input[type=file]").set_input_files([str(file) for file in files])
        opened.locator(".pic").nth(2).wait_for()
        opened.get_by_label("Class word").fill("ball")
        yield opened


def train(page: Any, base: str) -> None:
    """Train LoRA on this base."""
    page.locator(".method", has_text="NoRA").locator("input:checked").uncheck()
    page.locator("#advanced > button").click()
    name = page.get_by_label("Base model")
    name.fill(base)
    name.press("Enter")
    page.locator("#summary dd", has_text=base.split("/")[1]).wait_for()
    for label, value in {"Steps": "1", "Batch": "1", "Sampling steps": "1"}.items():
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).blur()
    page.get_by_label("Training seeds").fill("0")
    page.get_by_label("Prompts").fill("a {subject}")
    page.wait_for_function("document.querySelector('#summary').innerText.includes('= 1')")
    page.locator("#train").click()
    page.locator("#queue table").wait_for()


def test_a_download_is_watched_and_its_base_used(page: Any) -> None:
    train(page, "owner/small")
    queue, told = page.locator("#queue"), re.compile(r"downloading small … ([\d.]+) of ([\d.]+) MB, (\d+) %")
    seen: list[tuple[float, float, int]] = []
    deadline = time.monotonic() + RUNNING_S
    while queue.locator("tr[data-state=done]").count() < 1:
        assert time.monotonic() < deadline, queue.inner_text()
        assert queue.locator("tr[data-state=failed]").count() == 0, page.locator("#failures").inner_text()
        if found := told.search(queue.inner_text()):
            seen.append((float(found[1]), float(found[2]), int(found[3])))
        time.sleep(0.1)
    assert any(0 < share < 100 for _, _, share in seen), seen
    whole = max(total for _, total, _ in seen)  # the VAE comes last and by itself: a base may have another in its place
    assert (shares := [share for _, total, share in seen if total == whole]) == sorted(shares)
    assert all(abs(100 * done / total - share) <= 5 for done, total, share in seen)
    page.locator(".grid img").nth(1).wait_for()  # the base's own and LoRA's


def test_a_hub_that_is_gone(page: Any, hub: Hub) -> None:
    """Last: the Hub does not come back."""
    hub.server.shutdown()
    hub.server.server_close()
    train(page, "owner/other")
    notices = page.locator("#failures .notice")
    notices.first.wait_for()
    page.locator("#queue tr[data-state=failed]").nth(1).wait_for()
    page.wait_for_function("document.querySelector('#failures').innerText.includes(';')")
    assert notices.count() == 1
    text = notices.locator("summary").evaluate("e => e.closest('.notice').innerText")
    assert "LoRA, seed 0, failed: 'owner/other' is not on this machine yet and the Hugging Face Hub" in text
    assert "cannot be reached: check the network, or give a local folder." in text
