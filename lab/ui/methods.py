"""Methods tab: the registry as a table, and one method at a time in full: equation, drawing, settings, paper."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab.bases import BASES
from lab.methods import METHODS, Layer, Method
from lab.registry import unknown
from lab.ui import Page, Tab, choices
from lab.ui.diagrams import diagram
from lab.ui.html import dot, e, empty, sentences, view
from lab.ui.settings import DEFAULT_BASE

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
SHOWN = Layer("attention projection", 1280, 1280, role="q")  # SDXL's most frequent adapted layer
FIRST = "nora"
LATEX = [{"left": "$$", "right": "$$", "display": True}]


def build(page: Page) -> None:
    first = FIRST if FIRST in METHODS else METHODS.ids()[0]
    with gr.Row(equal_height=False, elem_id="method-card"):
        with gr.Column(scale=3, min_width=320):
            top = gr.HTML(card_top(METHODS[first]), apply_default_css=False, js_on_load=None)
            equation = gr.Markdown(latex(METHODS[first]), latex_delimiters=LATEX, elem_id="equation")
            drawing = gr.HTML(card_drawing(METHODS[first]), apply_default_css=False, js_on_load=None)
        with gr.Column(scale=2, min_width=300):
            settings = gr.HTML(card_settings(METHODS[first]), apply_default_css=False, js_on_load=None)
    with gr.Row():
        kinds = sorted({method.kind for method in METHODS})
        text = gr.Textbox(label="Search", placeholder="name, kind, paper", scale=3, max_length=100)
        kind = gr.Dropdown([("any kind", ""), *((k, k) for k in kinds)], value="", label="Kind", min_width=160)
    listing = view(table("", ""), apply_default_css=False, elem_id="methods-table")
    shown_id = gr.Textbox(visible="hidden", elem_id="shown-method")
    card = [top, equation, drawing, settings, shown_id]

    def clicked(event: gr.EventData) -> list[Any]:
        return full(str((event._data or {}).get("id") or ""))

    def land(request: gr.Request) -> list[Any]:
        asked = dict(request.query_params)
        id = asked.get("method") or ""
        return full(id) if asked.get("tab") == "methods" and id in METHODS else [gr.skip()] * 5

    gr.on([text.change, kind.input], table, [text, kind], listing, trigger_mode="always_last", **QUIET)
    to_card = (
        "(id) => { window.lab.params('methods', {method: id});"
        " document.querySelector('#method-card')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"
    )
    listing.click(sentences(clicked), None, card, **QUIET).then(None, shown_id, None, js=to_card)
    page.demo.load(land, None, card, **QUIET)


# -- handlers: plain functions ---------------------------------------------------------------------------
def full(id: str) -> list[Any]:
    """Contents of the card for this method. Raises LabError for an unknown one."""
    if id not in METHODS:
        raise unknown("method", id[:60], METHODS.ids())
    method = METHODS[id]
    return [card_top(method), latex(method), card_drawing(method), card_settings(method), id]


def latex(method: Method) -> str:
    return f"$${method.equation}$$"


def traits(method: Method) -> list[str]:
    """What it is and can do, in a few words each."""
    found = [method.kind, "ours" if method.own else "from PEFT"]
    found.append("exactly low rank: exports as LoRA" if method.low_rank else "full rank: exports with an error shown")
    found.append("starts as the base model" if method.identity_start else "does not start as the base model")
    if method.conv:
        found.append("convolutions too")
    if not method.mergeable:
        found.append("cannot be merged")
    if method.needs:
        found.append(f"needs a batch of {method.needs}" if method.needs == "activations" else "needs one gradient")
    return found


def card_top(method: Method) -> str:
    tags = "".join(f'<span class="tag{" own" if t == "ours" else ""}">{e(t)}</span>' for t in traits(method))
    paper = method.paper
    link = (
        f'<a href="{e(paper.url)}" target="_blank" rel="noopener">{e(paper.title)}</a>'
        if paper.arxiv
        else e(paper.title)
    )
    return (
        f'<div class="lab headline"><h2>{dot(method.id)} {e(method.name)}</h2><p style="color:inherit">{e(method.summary)}</p>'
        f'<span class="tags">{tags}</span><p>{link}</p></div>'
    )


def card_drawing(method: Method) -> str:
    number = layer_count(method)
    share = ""
    if number:
        percent = 100 * number / (SHOWN.m * SHOWN.n)
        share = f"{number:,} trained numbers for a 1280×1280 layer with the default settings, {percent:.3g} % of W."
    remark = f'<div class="notice" style="margin-top:14px">{e(method.remark)}</div>' if method.remark else ""
    return f'<div class="lab">{diagram(method)}<p><small>Dashed is frozen, coloured is trained. {e(share)}</small></p>{remark}</div>'


def card_settings(method: Method) -> str:
    rows = "".join(
        f'<tr><td class="mono"><b>{e(k["name"])}</b></td><td class="mono">{e(_default(k["default"]))}</td>'
        f"<td>{e(k['help'])}<small>{e(_range(k))}</small></td></tr>"
        for k in choices.knobs(method)
    )
    body = f'<table class="data"><thead><tr><th>Setting</th><th>Default</th><th>Meaning</th></tr></thead><tbody>{rows}</tbody></table>'
    rate = BASES[DEFAULT_BASE].learning_rate(method)
    told = f"<p><small>Recommended learning rate for a subject on the embedded base: {rate:g}</small></p>"
    inside = body if rows else '<p style="padding:14px">This method has no settings.</p>'
    return f'<div class="lab" style="display:grid;gap:8px"><div class="scroll">{inside}</div>{told}</div>'


def _default(value: Any) -> str:
    return "automatic" if value is None else str(value)


def _range(knob: dict[str, Any]) -> str:
    if knob["choices"]:
        return "one of " + ", ".join(knob["choices"])
    bounds = [
        f"at least {knob['low']:g}" if knob["low"] is not None else "",
        f"at most {knob['high']:g}" if knob["high"] is not None else "",
    ]
    return ", ".join(b for b in bounds if b)


def layer_count(method: Method) -> int | None:
    """Trained numbers on one 1280×1280 layer, or None where that is not known without a model."""
    try:
        return method.count([SHOWN], method.knobs())
    except Exception:  # a row that counts by model, or settings that do not fit this layer: the figure is left out
        return None


def table(text: str | None, kind: str | None) -> str:
    """The registry's rows that match, as HTML."""
    words = (text or "").lower()[:100].split()
    found = [
        m
        for m in METHODS
        if (not kind or m.kind == kind)
        and all(w in f"{m.id} {m.name} {m.kind} {m.summary} {m.paper.title}".lower() for w in words)
    ]
    if not found:
        return f'<div class="lab">{empty("Nothing matches", "No method fits this search: try another word or any kind.")}</div>'
    rows = "".join(_row(m) for m in found)
    return (
        '<div class="lab scroll"><table class="data methods-list"><thead><tr><th>Method</th><th>Kind</th><th>What it does</th>'
        f'<th class="r">Per 1280×1280 layer</th><th>Paper</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(method: Method) -> str:
    number = layer_count(method)
    label = method.paper.arxiv if method.paper.arxiv and not method.paper.arxiv.startswith("http") else "link"
    paper = (
        f'<a href="{e(method.paper.url)}" target="_blank" rel="noopener">{e(label)}</a>' if method.paper.arxiv else "–"
    )
    return (
        f'<tr><td class="name">{dot(method.id)}<a href="#" data-do="show" data-id="{e(method.id)}">{e(method.name)}</a></td>'
        f"<td><small>{e(method.kind)}</small></td><td>{e(method.summary)}</td>"
        f'<td class="r num">{f"{number:,}" if number else "–"}</td><td class="num">{paper}</td></tr>'
    )


TAB = Tab("methods", "Methods", 50, build)
