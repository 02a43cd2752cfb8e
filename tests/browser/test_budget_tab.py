"""The Budget tab in a real browser: sliders, equal budget typed and dragged, links, copies, and every bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser, marks

PATIENCE_MS = 60_000

pytestmark = marks(400)


@pytest.fixture
def visit(page_address: str) -> Iterator[Any]:
    """A function that opens an address of the tab; script errors fail the test."""
    with browser() as chrome:
        wrong: list[str] = []

        def go(query: str = "", width: int = 1280) -> Any:
            page = chrome.new_page(viewport={"width": width, "height": 1000})
            page.set_default_timeout(PATIENCE_MS)
            page.on("pageerror", lambda problem: wrong.append(str(problem)))
            page.goto(f"{page_address}/?tab=budget{query}")
            page.locator(".results tbody tr").first.wait_for()
            return page

        yield go
    assert not wrong


def count(page: Any, method: str, has: str) -> None:
    page.locator(f'.bcard[data-method="{method}"] .count', has_text=has).wait_for()


def test_sliders_links_and_charts(visit: Any) -> None:
    page = visit()
    assert page.locator(".results tbody tr").count() == 5
    assert page.locator(".chart svg path").count() >= 5
    page.locator('[data-knob="lora.r"]').focus()
    page.keyboard.press("End")
    count(page, "lora", f"{640 * 1_451_520:,}")
    assert float(page.locator("#budget [data-ms], #budget[data-ms]").first.get_attribute("data-ms")) > 0
    page.locator('.targets input[value="down"]').check()
    page.locator("select.by").select_option("kinds")
    page.locator(".chart.by-layer text", has_text="down").wait_for()
    page.wait_for_url("**targets=q%2Ck%2Cv%2Cout%2Cdown**")
    table = page.locator(".results tbody").inner_text()
    other = visit(page.url.split("tab=budget")[1])
    other.wait_for_function("t => document.querySelector('.results tbody').innerText === t", arg=table)


def test_equal_budget_typed_and_dragged(visit: Any) -> None:
    page = visit()
    page.locator(".equal input[type=checkbox]").check()
    typed = page.locator(".equal input[type=number]")
    typed.fill("94208")
    lora = page.locator('.bcard[data-method="lora"] .sub')
    lora.filter(has_text="LoRA's floor here is 1,451,520: rank 1").wait_for()
    page.locator('.bcard[data-method="nola"] .sub', has_text="from the budget").wait_for()
    box = page.locator(".equal input[type=range]").bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2, steps=12)
    page.mouse.up()
    lora.filter(has_text="from the budget").wait_for()
    assert int(typed.input_value()) > 1_451_520
    page.wait_for_url(f"**budget={typed.input_value()}**")
    page.locator('[data-knob="nola.r"]').focus()
    page.keyboard.press("ArrowRight")  # a rank that costs nothing leaves the budget on
    page.wait_for_url("**r%3D9**")
    assert page.locator(".equal input[type=checkbox]").is_checked()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("csv", "times_smaller_than_lora_r1"),
        ("markdown", "| LoRA | r = 4 |"),
        ("peft", "target_modules="),
        ("command", "python -m lab subject"),
    ],
)
def test_copies(visit: Any, what: str, said: str) -> None:
    page = visit()
    page.locator(f'.copies [data-copy="{what}"]').click()
    page.locator("pre.copied", has_text=said).wait_for()


def test_bad_input_is_one_sentence(visit: Any, tmp_path: Path) -> None:
    page = visit(width=390)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out on a phone
    rank = page.locator('.bcard[data-method="lora"] .knob-line input[type=number]')
    rank.fill("5000")
    page.locator('.bcard[data-method="lora"] .sub.bad', has_text="take at most 640").wait_for()
    rank.fill("4")
    count(page, "lora", "5,806,080")
    page.locator(".equal input[type=checkbox]").check()
    typed, bad = page.locator(".equal input[type=number]"), page.locator(".said-bad .notice")
    for number, said in (
        ("0", "at least 1 parameter, got 0"),
        ("-7", "at least 1 parameter, got -7"),
        (str(10**15), "larger than any model"),
    ):
        typed.fill(number)
        bad.filter(has_text=said).wait_for()
        assert bad.count() == 1
    typed.fill("2000000")
    bad.wait_for(state="detached")
    page.locator(".equal input[type=checkbox]").uncheck()
    page.locator("details.bring summary").click()
    deep = b'{"a":' * 1000 + b"1" + b"}" * 1000
    for content, said in (
        (b"{", "is not JSON"),
        (b" " * 50_000_000, "has 50.0 MB"),
        (deep, "nested more than 32 deep"),
        (b'{"model_type": "model-of-tomorrow", "auto_map": {"AutoModel": "a--b.C"}}', "knows no model type"),
    ):
        # A path: bytes would travel to the browser as text, a minute for the large one.
        config = tmp_path / "config.json"
        config.write_bytes(content)
        page.locator(".drop input").set_input_files(config)
        page.locator(".told .notice.bad", has_text=said).wait_for()
    page.locator(".paste textarea").fill("q 64 64 times 2")
    page.locator(".paste button").click()
    page.wait_for_url("**arch=own-**")
    page.locator(".facts", has_text="2 layers adapted").wait_for()
    page.locator(".hub input").fill("gpt2")
    page.locator(".hub button").click()
    page.locator(".told .notice.bad", has_text="no model's name on the Hub").wait_for()
    assert visit("&arch=sdxl-unett").locator(".said-bad .notice", has_text="did you mean sdxl-unet").inner_text()
