"""Small pieces of HTML that tabs share. Everything that a visitor typed goes through `e`."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from lab.errors import LabError
from lab.plots import colour

STATIC = Path(__file__).parent / "static"
STATES = {"queued": "queued", "running": "running", "done": "done", "failed": "failed", "cancelled": "cancelled"}

# Clicks on anything with data-do="verb" (and data-id, ...) reach the component's `.click` handler as event data.
_CLICKS = """
element.addEventListener('click', (event) => {
  const hit = event.target.closest('[data-do]');
  if (hit && element.contains(hit)) { event.preventDefault(); trigger('click', {...hit.dataset}); }
});
"""


def e(value: Any) -> str:
    """Text made safe for HTML and for attribute values in double quotes."""
    return html.escape(str(value), quote=True)


def view(value: str = "", **options: Any) -> gr.HTML:
    """An HTML component whose `.click(handler)` gets `event: gr.EventData` with the clicked element's data-*."""
    return gr.HTML(value, js_on_load=_CLICKS, **options)


def static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def dot(method: str) -> str:
    return f'<i class="dot" style="--c:{colour(method)}"></i>'


def pill(state: str) -> str:
    return f'<span class="pill {STATES.get(state, "queued")}">{STATES.get(state, "queued")}</span>'


def error(sentence: str, more: str = "") -> str:
    """The one sentence of something that went wrong, with details (already HTML) folded away."""
    return f'<div class="notice bad" role="alert"><b>{e(sentence)}</b>{more}</div>'


def empty(title: str, text: str, more: str = "") -> str:
    return f'<div class="empty"><h3>{e(title)}</h3><p>{e(text)}</p>{more}</div>'


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: "8 s", "3 min 20 s", "2 h 5 min"."""
    if seconds is None or seconds != seconds or seconds < 0:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float | None) -> str:
    """Bytes in binary units, three significant figures."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return "–"


def sentences(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Handlers raise LabError; a visitor sees its sentence in a notice at the page's edge, never a traceback."""

    @functools.wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except LabError as problem:
            raise gr.Error(e(problem), title="That did not work", duration=12, print_exception=False) from problem

    return guarded
