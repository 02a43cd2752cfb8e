"""The visitor's whole path, short, in a real browser: pictures in, two methods trained, everything taken away."""

from __future__ import annotations

import csv
import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.browser import browser, marks

PATIENCE_MS = 60_000
TRAINING_S = 420  # two runs of three steps take a minute on a free machine of two cores

pytestmark = marks(600)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three pictures of a green disc, wider than high, one caption, and a file that is no picture."""
    for number, ground in enumerate(("#b7d3f2", "#f2d9b7", "#d6c3ee")):
        picture = Image.new("RGB", (120, 80), ground)
        ImageDraw.Draw(picture).ellipse((35, 15, 85, 65), fill="#2d8f4e")
        picture.save(tmp_path / f"disc{number}.png")
    (tmp_path / "disc1.txt").write_text("a disc on sand")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    return [str(path) for path in sorted(tmp_path.iterdir())]


def problems_of(page: Any) -> list[str]:
    """Collects what goes wrong in the page: script errors and failed requests."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("response", lambda r: found.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    return found


def fill_number(page: Any, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).fill(value)
    page.get_by_label(label, exact=True).blur()


def test_the_whole_path(page_address: str, chrome: Any, files: list[str], tmp_path: Path) -> None:
    context = chrome.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    problems = problems_of(page)
    page.goto(page_address)

    # Pictures: the good ones appear, the bad one is named in a sentence.
    page.locator("#upload input[type=file]").set_input_files(files)
    page.locator(".pic").nth(2).wait_for()
    assert "broken.png" in page.locator("#unused-files .notice").inner_text()
    assert page.locator(".pic").count() == 3
    assert "a disc on sand" in [t.input_value() for t in page.locator(".pic textarea").all()]
    crop_and_caption(page)

    # Words, methods and a short training.
    page.get_by_label("Class word").fill("ball")
    assert page.locator(".method input:checked").count() == 2
    page.locator("#advanced > button").click()
    fill_number(page, "Steps", "3")
    fill_number(page, "Batch", "2")
    fill_number(page, "Sampling steps", "2")
    page.get_by_label("Training seeds").fill("0")
    page.get_by_label("Picture seeds").fill("3, 4")
    page.get_by_label("Prompts").fill("a {subject} in the snow\na {subject}")
    page.wait_for_function("document.querySelector('#summary').innerText.includes('= 2')")

    # Train: the queue is shown at once, with a permalink; a reload in the middle comes back to it.
    page.locator("#train").click()
    page.locator("#queue table").wait_for()
    page.wait_for_url("**comparison=*")
    assert page.locator("#queue tr[data-run]").count() == 3
    page.reload()
    page.locator("#queue table").wait_for()
    deadline = time.monotonic() + TRAINING_S
    while page.locator("#queue tr[data-state=done]").count() < 3:
        assert time.monotonic() < deadline, page.locator("#queue").inner_text()
        assert page.locator("#queue tr[data-state=failed]").count() == 0, page.locator("#failures").inner_text()
        time.sleep(0.5)

    results(page)
    downloads(page)
    other_visitor(chrome, page)
    assert not problems, problems
    context.close()


def crop_and_caption(page: Any) -> None:
    """Drag the first picture's square to the left edge, and type a caption."""
    square = page.locator(".pic .crop").first
    before = square.evaluate("e => parseFloat(e.style.left)")
    box = square.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 200, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert before == pytest.approx(100 / 6, abs=0.5)  # centred: 20 of 120 pixels
    assert square.evaluate("e => parseFloat(e.style.left)") == 0
    page.locator(".pic textarea").first.fill("a ball that {subject} ${1+1} <b>is</b>")


def results(page: Any) -> None:
    """The grid, the enlarged picture, the overlay, the table, both charts."""
    page.locator(".grid img").nth(5).wait_for()
    assert page.locator(".grid img").count() == 2 * 3
    for image in page.locator(".grid img").all():
        image.scroll_into_view_if_needed()
        page.wait_for_function("i => i.complete && i.naturalWidth > 0", arg=image.element_handle())
    page.locator(".grid img").nth(1).click()
    assert page.locator("dialog.lightbox figcaption").inner_text().startswith("LoRA: a ball in the snow")
    page.keyboard.press("ArrowRight")
    assert page.locator("dialog.lightbox figcaption").inner_text().startswith("NoRA: a ball in the snow")
    page.keyboard.press("Escape")
    source = page.locator(".grid img").first.get_attribute("src")
    page.locator("#picture-seed").get_by_label("4").check()
    page.wait_for_function("s => document.querySelector('.grid img').getAttribute('src') !== s", arg=source)
    page.locator(".over input").fill("25")
    assert page.locator(".over").evaluate("e => e.style.getPropertyValue('--cut')") == "25%"
    table = page.locator("#table table").inner_text()
    assert all(name in table for name in ("Base model", "LoRA", "NoRA", "CLIP-T", "CLIP-I"))
    assert page.locator("#loss .js-plotly-plot .scatterlayer .trace").count() >= 2


def downloads(page: Any) -> None:
    """Adapters as zip, grid as PNG, table as CSV, report in a page of its own."""
    got = {}
    for link in page.locator("#downloads a[download]").all():
        with page.expect_download() as waiting:
            link.click()
        got[waiting.value.suggested_filename] = Path(waiting.value.path()).read_bytes()
    zips = [zipfile.ZipFile(io.BytesIO(data)).namelist() for name, data in got.items() if name.endswith(".zip")]
    assert len(zips) == 2
    assert all(any(n.endswith("adapter_model.safetensors") for n in names) for names in zips)
    picture = next(data for name, data in got.items() if name.endswith("grid.png"))
    assert Image.open(io.BytesIO(picture)).width > 500
    table = next(data for name, data in got.items() if name.endswith("results.csv")).decode()
    assert {"base", "lora", "nora"} <= {row["method"] for row in csv.DictReader(io.StringIO(table))}
    with page.context.expect_page() as waiting:
        page.locator("#downloads a", has_text="Report").click()
    assert "NoRA" in waiting.value.locator("body").inner_text()
    waiting.value.close()


def other_visitor(chrome: Any, page: Any) -> None:
    """Somebody else with the same address sees a sentence, and has no runs; the owner finds the run in the list."""
    context = chrome.new_context()
    stranger = context.new_page()
    stranger.goto(page.url)
    stranger.locator("#comparison-head .notice", has_text="not found").wait_for(timeout=PATIENCE_MS)
    stranger.get_by_role("tab", name="Runs").click()
    stranger.locator("#runs", has_text="No runs yet").wait_for(timeout=PATIENCE_MS)
    context.close()
    page.get_by_role("tab", name="Runs").click()
    page.locator("#runs", has_text="sks ball").wait_for()
    page.locator("#runs [data-do=log]").nth(1).click()
    page.locator("#runs pre.log").wait_for()
    page.locator("#runs summary", has_text="Delete").click()
    page.locator("#runs [data-do=delete]").click()
    page.locator("#runs", has_text="No runs yet").wait_for()


def test_bad_input_is_told_beside_the_button(page_address: str, chrome: Any) -> None:
    context = chrome.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(page_address)
    page.locator(".example").first.click()
    page.locator(".pic").nth(4).wait_for()
    page.locator("#advanced > button").click()
    fill_number(page, "Steps", "0")
    page.locator("#train").click()
    page.locator("#notice .notice", has_text="steps must be between 1").wait_for()
    assert page.locator("#queue table").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out on a phone
    page.goto(f"{page_address}?tab=methods")
    page.locator("svg.diagram").first.wait_for()
    assert page.evaluate("document.querySelector('svg.diagram').getBoundingClientRect().right <= innerWidth")
    context.close()
