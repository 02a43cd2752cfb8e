"""How long a slider's move on the Budget tab takes until its result is painted, in Chromium on this machine.

Serves the page from a process of its own, opens the tab with five methods on SDXL, presses the arrow keys on every
slider in turn and takes the time from the input event to the painted frame: table, cards and charts.
Needs playwright (tests/requirements.txt) and Chromium (CHROMIUM, or the one on the path, or playwright's own).
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

HELP = "a slider's move on the Budget tab, until painted in Chromium"
METHODS = ("lora", "nora", "nola", "dora", "vera")
STARTING_S = 120
SERVE = "import sys, uvicorn; from lab.ui.page import application; uvicorn.run(application(sys.argv[1]), port=int(sys.argv[2]), log_level='error')"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--moves", type=int, default=10, help="moves of each slider")
    parser.add_argument("--arch", default="sdxl-unet")
    parser.add_argument("--equal", action="store_true", help="move the equal budget instead")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"moves", "median_ms", "p90_ms", "worst_ms", "load"}."""
    with tempfile.TemporaryDirectory() as home:
        port = _free_port()
        environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
        server = subprocess.Popen([sys.executable, "-c", SERVE, home, str(port)], env=environment)
        try:
            _wait(port)
            times = measure(f"http://127.0.0.1:{port}/", args.arch, args.moves, equal=args.equal)
        finally:
            server.terminate()
            server.wait(20)
    times.sort()
    return {
        "arch": args.arch,
        "methods": list(METHODS),
        "moves": len(times),
        "median_ms": round(statistics.median(times), 1),
        "p90_ms": round(times[int(0.9 * (len(times) - 1))], 1),
        "worst_ms": round(times[-1], 1),
        "load": round(os.getloadavg()[0], 1),
    }


def measure(url: str, arch: str, moves: int, *, equal: bool = False) -> list[float]:
    """Milliseconds of every move, from the input event to the painted frame."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        budget = "&budget=1000000" if equal else ""
        page.goto(f"{url}?tab=budget&arch={arch}&m={'~'.join(METHODS)}{budget}", timeout=STARTING_S * 1000)
        page.wait_for_selector(".budget .chart[data-figure=files] svg", timeout=STARTING_S * 1000)
        page.wait_for_function("document.querySelector('#budget [data-ms], #budget[data-ms]') !== null")
        sliders = page.locator(".budget .equal input[type=range]" if equal else ".budget .bcard input[type=range]")
        times: list[float] = []
        for i in range(sliders.count()):
            sliders.nth(i).focus()
            for move in range(moves + 1):
                before = page.evaluate(_SEEN)
                page.keyboard.press("ArrowRight" if move % 4 < 3 else "ArrowLeft")
                try:
                    page.wait_for_function(f"({_SEEN}) !== {before!r}", timeout=4000)
                except Exception:  # the key did not change a whole-number setting: no move
                    continue
                if move:  # the first one of each slider is for warming up
                    times.append(float(page.evaluate(_MS)))
        browser.close()
    return times


_NODE = "(document.querySelector('#budget [data-seen]') || document.querySelector('#budget'))"
_SEEN, _MS = f"{_NODE}.dataset.seen", f"{_NODE}.dataset.ms"


def chromium() -> str | None:
    """Chromium's path; None leaves it to playwright's own."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    return found or shutil.which("google-chrome")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait(port: int) -> None:
    end = time.monotonic() + STARTING_S
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"the page did not answer within {STARTING_S} seconds")


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['moves']} moves, {len(result['methods'])} methods on {result['arch']}: median {result['median_ms']} ms, "
        f"90 % within {result['p90_ms']} ms, worst {result['worst_ms']} ms (load {result['load']})"
    )
