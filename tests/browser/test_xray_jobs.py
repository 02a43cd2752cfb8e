"""Compress and Merge in a real browser: two files sent, one compressed with pictures before and after, both merged, the
results taken away and opened again from the list."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.browser import browser, marks
from tests.browser.test_xray_tab import NAMES, adapter

PATIENCE_MS = 180_000
JOB_S = 420  # four runs with pictures take half a minute on a free machine of two cores

pytestmark = marks(1200)


def send(page: Any, path: str) -> None:
    page.locator("#xray-upload input[type=file]").set_input_files(path)
    page.locator(".xray-facts h3", has_text=Path(path).stem).wait_for()


def finished(page: Any, section: str, title: str, methods: int) -> Any:
    """Wait until the job of this title has run; the rows of what it made."""
    panel, deadline = page.locator(f"#xray-{section}-panel"), time.monotonic() + JOB_S
    panel.locator(".headline", has_text=title).wait_for()
    while panel.locator(".headline .pill", has_text="done").count() == 0:
        assert time.monotonic() < deadline, panel.inner_text()
        assert panel.locator("tr[data-state=failed]").count() == 0, panel.inner_text()
        time.sleep(0.5)
    rows = panel.locator("tr[data-done]")
    assert rows.count() == methods
    return rows


def taken(page: Any, row: Any, to: Path) -> None:
    """The three files of a row hold an adapter."""
    for layout in ("PEFT", "diffusers", "kohya"):
        with page.expect_download() as got:
            row.get_by_text(layout, exact=True).click()
        got.value.save_as(to / layout)
    with zipfile.ZipFile(to / "PEFT") as file:
        assert any(name.endswith("adapter_model.safetensors") for name in file.namelist())
    assert all(0 < len(load_file(to / layout)) <= 3 * len(NAMES) for layout in ("diffusers", "kohya"))


def test_compress_merge_take_and_open_again(page_address: str, tmp_path: Path) -> None:
    with browser() as chrome:
        page: Any = chrome.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True).new_page()
        page.set_default_timeout(PATIENCE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda problem: wrong.append(str(problem)))
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(f"{page_address}?tab=xray")
        page.locator("#xray-facts .empty").wait_for()
        send(page, adapter(tmp_path / "blue car.safetensors", 2, rank=2))
        send(page, adapter(tmp_path / "red fox.safetensors", 1))

        # Compress: NoRA and a LoRA of a lower rank at a quarter of the parameters, with pictures before and after.
        page.locator("#xray-compress > button").click()
        suggested = "document.querySelector('#xray-compress-budget input').value === '1440'"
        page.wait_for_function(suggested)  # comes with the prompts, after the facts
        page.locator("#xray-compress-prompts textarea").fill("a fox in the snow")
        page.locator("#xray-compress-start").click()
        rows = finished(page, "compress", "Compress red fox", 2)
        assert page.locator("#xray-compress-panel .grid .col").all_inner_texts() == [
            "Base model", "Original", "NoRA", "LoRA"
        ]  # fmt: skip
        assert page.locator("#xray-compress-panel .grid img").count() == 8
        page.locator("#xray-compress-plot .scatterlayer .trace").nth(1).wait_for()
        for row in rows.all():
            taken(page, row, tmp_path)

        # Merge: the exact sum, then TIES; without pictures.
        page.locator("#xray-merge > button").click()
        page.locator("#xray-merge-others input").click()
        page.locator("#xray-merge-others [role=option]", has_text="blue car").click()
        page.keyboard.press("Escape")
        page.locator("#xray-merge-prompts textarea").fill("")
        page.locator("#xray-merge-start").click()
        (row,) = finished(page, "merge", "Merge red fox + blue car", 1).all()
        assert "exact but for rounding" in row.inner_text()
        taken(page, row, tmp_path)

        page.locator("#xray-merge-how label", has_text="TIES").click()
        page.locator("#xray-merge-start").click()
        page.locator("#xray-merge-panel tr[data-done]", has_text="ties, rank 3").wait_for(timeout=JOB_S * 1000)
        taken(page, page.locator("#xray-merge-panel tr[data-done]").first, tmp_path)

        # What was made stands in the list of adapters, and opens by a click.
        page.reload()
        page.locator(".xray-facts h3", has_text="red fox").wait_for()
        page.locator("#xray-adapter input").click()
        page.locator("#xray-adapter [role=option]", has_text="Compress red fox · NoRA").click()
        page.locator(".xray-facts h3", has_text="Compress red fox · NoRA").wait_for()
        assert not wrong
