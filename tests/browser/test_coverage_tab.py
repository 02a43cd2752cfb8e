"""The Coverage tab in a real browser: an address is reproduced, a change is drawn, files come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.browser import browser, marks

PATIENCE_MS = 90_000

pytestmark = marks(400)


def test_a_link_a_change_and_the_files(page_address: str, tmp_path: Path) -> None:
    with browser() as chrome:
        page: Any = chrome.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True).new_page()
        page.set_default_timeout(PATIENCE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda problem: wrong.append(str(problem)))
        page.goto(f"{page_address}?tab=coverage&d=8&m=pranc,nola&n=4,8,16&show=coverage")
        page.locator("#coverage-table .take code").wait_for()
        command = page.locator("#coverage-table .take code").inner_text()
        assert command == "python -m lab coverage --d 8 --method pranc --method nola --params 4,8,16"
        page.locator("#coverage-plot .legendtext").nth(1).wait_for()  # the table may be there before the chart
        assert page.locator("#coverage-plot .legendtext").all_text_contents() == ["PRANC", "NOLA"]
        with page.expect_download() as got:
            page.locator("#coverage-table a.act").click()
        got.value.save_as(tmp_path / "points.csv")
        assert (tmp_path / "points.csv").read_text().splitlines()[3].startswith("pranc,8,16,16,16,0.25,0.25")

        page.get_by_label("Degrees of freedom").check()
        page.wait_for_url("**show=local**")
        page.locator("#coverage-plot .ytitle", has_text="local dimension").wait_for()
        with page.expect_download() as got:
            page.locator("#coverage-table [data-png]").click()
        got.value.save_as(tmp_path / "plot.png")
        assert got.value.suggested_filename == "coverage-d8-local.png"
        from PIL import Image

        colours = Image.open(tmp_path / "plot.png").convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert (209, 80, 143) in {colour for _, colour in colours}  # PRANC's points are in the picture
        page.locator("#coverage-spectrum .legendtext").first.wait_for()
        assert not wrong


def test_a_large_layer_is_measured_by_the_queue(page_address: str) -> None:
    with browser() as chrome:
        page: Any = chrome.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.set_default_timeout(PATIENCE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda problem: wrong.append(str(problem)))
        page.goto(f"{page_address}?tab=coverage&d=40&m=pranc,nora&n=16,64")
        page.locator("#coverage-measure", has_text="Measure 4 points").click()
        page.locator("#coverage-job tr[data-run]").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator("#coverage-table summary", has_text="All 4 points").wait_for()
        page.locator("#coverage-job tr[data-run]").first.wait_for(state="detached")
        assert not page.locator("#coverage-measure").is_visible()

        # The link shows the points at once, to anybody.
        other = chrome.new_context().new_page()
        other.goto(page.url)
        other.locator("#coverage-table summary", has_text="All 4 points").wait_for(timeout=PATIENCE_MS)
        assert other.locator("#coverage-job tr[data-run]").count() == 0
        assert not wrong
