"""Pictures of every tab, light and dark, at 1280 and 390 pixels: `python -m tests.screenshots [FOLDER] [--steps N]`.

Trains the first example subject once, with the page's defaults (or N steps), and takes the pictures on the way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.browser import browser, chromium, server

WIDTHS = {1280: 900, 390: 844}
THEMES = ("light", "dark")
PATIENCE_MS = 120_000
SETTLE_S = 3.0  # charts and fonts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="out/screenshots", type=Path)
    parser.add_argument("--steps", type=int, help="train less than the default")
    given = parser.parse_args()
    if chromium() is None:
        parser.error("no Chromium is installed (set LAB_CHROMIUM to its path)")
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, server(Path(scratch) / "home") as address, browser() as chrome:
        take(chrome, address, given.folder, given.steps)
    print(f"{len(list(given.folder.glob('*.png')))} pictures in {given.folder}")


def take(chrome: Any, address: str, folder: Path, steps: int | None) -> None:
    context = chrome.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    for tab, wait in (
        ("subject", ".example"),
        ("runs", "#runs .empty"),
        ("methods", "#methods-table table"),
        ("budget", "#tab-budget"),
        ("system", "#system table"),
    ):
        every_look(
            chrome, None, f"{address}?tab={tab}", wait, folder, f"{tab}-empty" if tab in ("subject", "runs") else tab
        )
    page.goto(address)
    page.locator(".example").first.click()
    page.locator(".pic").nth(2).wait_for()
    if steps:
        page.locator("#advanced > button").click()
        page.get_by_label("Steps", exact=True).fill(str(steps))
    time.sleep(SETTLE_S)
    every_look(chrome, context, address, ".pic", folder, "subject-draft")
    page.locator("#train").click()
    page.locator("#queue table").wait_for()
    page.wait_for_url("**comparison=*")
    page.locator(".preview img").first.wait_for(timeout=900_000)
    every_look(chrome, context, page.url, ".preview img", folder, "comparison-running")
    page.locator("#queue tr[data-state=done]").nth(page.locator("#queue tr[data-run]").count() - 1).wait_for(
        timeout=1_800_000
    )
    every_look(chrome, context, page.url, ".grid img", folder, "comparison")
    every_look(chrome, context, f"{address}?tab=runs", "#runs table", folder, "runs")


def every_look(chrome: Any, visitor: Any, address: str, wait: str, folder: Path, name: str) -> None:
    """One picture for each width and theme, as this visitor (or a new one) sees the address."""
    state = visitor.storage_state() if visitor else None
    for theme in THEMES:
        for width, height in WIDTHS.items():
            context = chrome.new_context(
                viewport={"width": width, "height": height}, color_scheme=theme, storage_state=state
            )
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.goto(address)
            page.locator(wait).first.wait_for()
            for image in page.locator("img[loading=lazy]:visible").all():
                image.scroll_into_view_if_needed()
            page.evaluate("scrollTo(0, 0)")
            time.sleep(SETTLE_S)
            page.screenshot(path=folder / f"{name}-{width}-{theme}.png", full_page=True)
            context.close()


if __name__ == "__main__":
    main()
