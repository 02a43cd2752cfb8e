"""How long a slider's move on the Budget tab takes until its result is painted, in Chromium on this machine.

Serves the page from a process of its own and opens the tab with five methods on SDXL. The arrow keys are pressed on
every slider in turn; the equal budget's slider is dragged with the mouse to places all over it, in an order that
jumps. Taken is the time from the input event to the painted frame: table, cards and charts.
Needs playwright (tests/requirements.txt) and Chromium (CHROMIUM, or the one on the path, or playwright's own).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "a slider's move on the Budget tab, until painted in Chromium"
METHODS = ("lora", "nora", "nola", "dora", "vera")
STARTING_S = 120
FIGURES = Path(__file__).with_suffix(".json")
SERVE = """
import sys, uvicorn
from lab.ui.page import application, settle
app = application(sys.argv[1])
settle()
uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--moves", type=int, default=10, help="moves of each slider (six times as many of the budget)")
    parser.add_argument("--arch", default="sdxl-unet")
    parser.add_argument("--write", action="store_true", help=f"write the figures into {FIGURES.name}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"arch", "methods", "cores", "load", "sliders": {"moves", "median_ms", "p90_ms", "worst_ms"}, "equal_budget": the same}."""
    with tempfile.TemporaryDirectory() as home:
        port = _free_port()
        environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
        server = subprocess.Popen([sys.executable, "-c", SERVE, home, str(port)], env=environment)
        try:
            _wait(port)
            address = f"http://127.0.0.1:{port}/?tab=budget&arch={args.arch}&m={'~'.join(METHODS)}"
            times = {"sliders": _visit(address, lambda page: pressed(page, args.moves))}
            times["equal_budget"] = _visit(f"{address}&budget=1000000", lambda page: dragged(page, 6 * args.moves))
        finally:
            server.terminate()
            server.wait(20)
    found = {name: _summary(sorted(ms)) for name, ms in times.items()}
    made = {"arch": args.arch, "methods": list(METHODS), "cores": os.cpu_count()}
    made |= {"load": round(os.getloadavg()[0], 1), **found}
    if args.write:
        FIGURES.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "moves": len(times),
        "median_ms": round(statistics.median(times), 1),
        "p90_ms": round(times[int(0.9 * (len(times) - 1))], 1),
        "worst_ms": round(times[-1], 1),
    }


def _visit(address: str, moves: Callable[[Any], list[float]]) -> list[float]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address, timeout=STARTING_S * 1000)
        page.wait_for_selector(".budget .chart[data-figure=files] svg", timeout=STARTING_S * 1000)
        page.wait_for_function("document.querySelector('#budget [data-ms], #budget[data-ms]') !== null")
        times = moves(page)
        browser.close()
    return times


def pressed(page: Any, moves: int) -> list[float]:
    """Milliseconds of every press of an arrow key, from the input event to the painted frame; the first press of each
    slider is for warming up."""
    times: list[float] = []
    sliders = page.locator(".budget .bcard input[type=range]")
    for i in range(sliders.count()):
        sliders.nth(i).focus()
        for move in range(moves + 1):
            key = "ArrowRight" if move % 4 < 3 else "ArrowLeft"
            taken = _taken(page, lambda key=key: page.keyboard.press(key))
            if move and taken is not None:
                times.append(taken)
    return times


def dragged(page: Any, moves: int) -> list[float]:
    """Milliseconds of every place that the equal budget's slider is dragged to; three places warm up."""
    box = page.locator(".budget .equal input[type=range]").bounding_box()
    y, width = box["y"] + box["height"] / 2, box["width"] - 18  # the knob's middle stays half its width from the ends
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    times = []
    for move in range(moves + 3):
        x = box["x"] + 9 + width * (move * 0.381966 % 1)  # the golden angle: near and far jumps, every place once
        taken = _taken(page, lambda x=x: page.mouse.move(x, y))
        if move >= 3 and taken is not None:
            times.append(taken)
    page.mouse.up()
    return times


def _taken(page: Any, act: Callable[[], None]) -> float | None:
    """Milliseconds until the answer to `act` is painted; None where it changed nothing (a whole number stayed)."""
    before = page.evaluate(_SEEN)
    act()
    try:
        page.wait_for_function(f"({_SEEN}) !== {before!r}", timeout=4000)
    except Exception:
        return None
    return float(page.evaluate(_MS))


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
    print(f"{len(result['methods'])} methods on {result['arch']} (load {result['load']})")
    for name, what in (("sliders", "a method's slider"), ("equal_budget", "the equal budget")):
        r = result[name]
        print(
            f"  {what}: {r['moves']} moves, median {r['median_ms']} ms, 90 % within {r['p90_ms']} ms, worst {r['worst_ms']} ms"
        )
