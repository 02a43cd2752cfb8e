"""The Few-shot tab in a real browser: a folder of classes in, two methods run, the table, and a picture of one's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.browser import browser, marks

PATIENCE_MS = 120_000
RUNNING_S = 300
SHAPES = ("ellipse", "rectangle", "regular_polygon")

pytestmark = marks(600)


def draw(shape: str, number: int) -> Image.Image:
    picture = Image.new("RGB", (64, 64), (40 * number % 200, 200 - 17 * number, 120 + 9 * number))
    pen, at = ImageDraw.Draw(picture), 14 + number % 4
    if shape == "regular_polygon":
        pen.regular_polygon((at + 16, at + 16, 18), 3, fill="#f2c12e")
    else:
        getattr(pen, shape)((at, at, at + 34, at + 34), fill="#c2303b" if shape == "ellipse" else "#2a62c9")
    return picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of nine pictures, one of them no picture, in sub-folders."""
    for shape in SHAPES:
        (tmp_path / "shapes" / shape).mkdir(parents=True)
        for number in range(9):
            draw(shape, number).save(tmp_path / "shapes" / shape / f"{number}.png")
    (tmp_path / "shapes" / SHAPES[0] / "broken.png").write_bytes(b"\x89PNG nothing")
    return tmp_path / "shapes"


def test_from_a_folder_to_the_table(page_address: str, folder: Path, tmp_path: Path) -> None:
    with browser() as chrome:
        page: Any = chrome.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True).new_page()
        page.set_default_timeout(PATIENCE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda problem: wrong.append(str(problem)))
        page.goto(f"{page_address}?tab=fewshot")
        upload(page, folder)
        choose(page)
        page.locator("#fs-run").click()
        wait_until_done(page)
        results(page, tmp_path)
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not wrong, wrong


def upload(page: Any, folder: Path) -> None:
    """A damaged picture is named; with consent it is left out; then the classes are shown with their counts."""
    page.locator("#fs-classes img").first.wait_for()
    page.locator("input[webkitdirectory]").set_input_files(str(folder))
    page.locator("#fs-told .notice", has_text="broken.png").wait_for()
    page.get_by_label("Leave out pictures that cannot be read").check()
    page.locator("#fs-classes", has_text="regular polygon").wait_for()


def choose(page: Any) -> None:
    page.get_by_text("Class names and template").click()
    names = page.locator("#fs-names textarea")
    names.fill(names.input_value().replace("regular polygon", "triangle <b>"))
    page.locator("#fs-template textarea, #fs-template input").fill("a drawing of a {}")
    for name in ("Tip-Adapter-F", "CLIP-LoRA"):
        page.locator("#fs-methods").get_by_label(name, exact=True).uncheck()
    for _ in range(2):  # LoRA, NoRA
        page.locator("#fs-adapters input").press("Backspace")
    for shots in ("4", "16"):
        page.locator("#fs-k").get_by_label(shots, exact=True).uncheck()
    page.locator("#fs-k").get_by_label("2", exact=True).check()
    page.locator("#fs-seeds textarea, #fs-seeds input").fill("1, 2")


def wait_until_done(page: Any) -> None:
    page.locator("#fs-queue").wait_for()
    deadline = time.monotonic() + RUNNING_S
    while page.locator("#fs-table tbody tr").count() < 2 or "running" in page.locator("#fs-queue").inner_text():
        assert time.monotonic() < deadline, page.locator("#fs-queue").inner_text()
        time.sleep(0.5)


def results(page: Any, tmp_path: Path) -> None:
    table = page.locator("#fs-table").inner_text()
    assert "Zero-shot" in table
    assert "Linear probe" in table
    draw("ellipse", 20).save(tmp_path / "mine.png")
    page.locator("#fs-own input[type=file]").set_input_files(str(tmp_path / "mine.png"))
    page.locator("#fs-answers", has_text="triangle <b>").wait_for()
