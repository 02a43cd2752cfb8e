"""Merge, in the X-ray tab: the opened adapter and others as one."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab import adapter_store
from lab.errors import LabError
from lab.merge import HOW, MAX_ADAPTERS
from lab.runs import Store
from lab.ui import Page
from lab.ui import _xray_jobs as work
from lab.ui._xray_compress import base_of
from lab.ui.html import error, sentences, view
from lab.ui.owner import owner_of

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
TITLE, TASK = "Merge", "merge"
INTRO = """<div class="lab xray-said"><p>The opened adapter and others, whatever methods they are of, as one ordinary LoRA: a
weighted sum of their updates, or what TIES and DARE make of it.</p></div>"""


def build(page: Page, parts: dict[str, Any]) -> None:
    """`parts` holds the tab's "opened" (the reference of the adapter shown) and "base" (the one chosen, or "")."""
    gr.HTML(INTRO, apply_default_css=False, js_on_load=None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=270):
            controls = _controls()
            start = gr.Button("Merge", variant="primary", elem_id="xray-merge-start")
            notice = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="xray-merge-notice")
        with gr.Column(scale=8, min_width=320):
            which = gr.Dropdown([], label="Shown", visible=False, elem_id="xray-merge-which")
            panel = view(work.NOTHING[TASK], apply_default_css=False, elem_id="xray-merge-panel")
            plot = gr.Plot(show_label=False, container=False, visible=False, elem_id="xray-merge-plot")
    timer = gr.Timer(work.TICK_S, active=False)
    _wire(page, parts, controls, start, notice, (which, panel, plot, timer))


def _controls() -> list[Any]:
    others = gr.Dropdown(
        [], multiselect=True, max_choices=MAX_ADAPTERS - 1, label="Merge with", info="Your runs and files.",
        elem_id="xray-merge-others",
    )  # fmt: skip
    weights = gr.Textbox(
        "", label="Weights", info="One for each, the opened one's first; empty: equal shares of 1.",
        placeholder="0.5, 0.5", max_length=200, elem_id="xray-merge-weights",
    )  # fmt: skip
    how = gr.Radio([(words, id) for id, words in HOW.items()], value="concat", label="How", elem_id="xray-merge-how")
    with gr.Row():
        rank = gr.Number(0, label="Rank", info="0: their largest.", precision=0, minimum=0, min_width=110)
        density = gr.Number(0.5, label="Kept share", info="TIES and DARE.", minimum=0.01, maximum=1, min_width=110)
    prompts = gr.Textbox(
        "\n".join(work.PROMPTS), label="Draw each and the merged one", info="A prompt a line; none: no pictures.",
        lines=2, max_length=2000, elem_id="xray-merge-prompts",
    )  # fmt: skip
    return [others, weights, how, rank, density, prompts]


def _wire(page: Page, parts: dict[str, Any], controls: list[Any], start: Any, notice: Any, views: Any) -> None:
    store, (which, panel, plot, timer) = page.store, views

    def begin(request: gr.Request, ref: str, base: str, *values: Any) -> tuple[Any, str]:
        owner = owner_of(request)
        try:
            cid = submit(store, owner, ref, base, *values)
        except LabError as problem:
            return gr.skip(), f'<div class="lab">{error(str(problem))}</div>'
        return work.chooser(store, owner, TASK, cid), ""

    def shown(request: gr.Request, cid: str | None) -> tuple[str, Any, Any]:
        return work.shown(store, owner_of(request), TASK, cid)

    def for_adapter(request: gr.Request, ref: str) -> tuple[Any, Any, Any]:
        owner = owner_of(request)
        last = next((c.id for c in work.jobs(store, owner, TASK) if c.spec.get("source") == ref), None)
        return others(store, owner, ref), work.prompts_for(store, owner, ref), work.chooser(store, owner, TASK, last)

    def acted(request: gr.Request, event: gr.EventData) -> Any:
        said = event._data or {}
        work.act(store, owner_of(request), said.get("do"), str(said.get("id") or ""))
        return gr.Timer(active=True)

    def elsewhere(request: gr.Request, cid: str | None) -> Any:
        owner = owner_of(request)
        known = {c.id for c in work.jobs(store, owner, TASK)}
        return work.chooser(store, owner, TASK, cid) if cid in known else gr.skip()

    start.click(begin, [parts["opened"], parts["base"], *controls], [which, notice], **QUIET)
    which.change(sentences(shown), which, [panel, plot, timer], **QUIET)
    timer.tick(sentences(shown), which, [panel, plot, timer], **QUIET)
    panel.click(sentences(acted), None, timer, **QUIET)
    parts["opened"].change(sentences(for_adapter), parts["opened"], [controls[0], controls[-1], which], **QUIET)
    page.opened.change(sentences(elsewhere), page.opened, which, **QUIET)


# -- handlers: plain functions -----------------------------------------------------------------------------------
def others(store: Store, owner: str, ref: Any) -> Any:
    """The dropdown of everything else that this owner can open."""
    return gr.Dropdown([(c.title, c.ref) for c in adapter_store.choices(store, owner) if c.ref != ref], value=[])


def submit(
    store: Store,
    owner: str,
    ref: Any,
    base: Any,
    picked: Any,
    weights: Any,
    how: Any,
    rank: Any,
    density: Any,
    prompts: Any,
) -> str:
    """Queue the job; its id. Raises LabError."""
    if not ref:
        raise LabError("No adapter is open: choose one above first.")
    if not picked:
        raise LabError("Choose at least one more adapter to merge with.")
    refs = [ref, *list(picked)[: MAX_ADAPTERS - 1]]
    found = [adapter_store.chosen(store, owner, r) for r in refs]
    spec = {
        "names": [c.title for c in found],
        "base": base_of(found[0], base),
        "weights": numbers(weights),
        "how": how,
        "rank": None if rank in (None, 0, "") else int(rank),
        "density": 0.5 if density is None else float(density),
        "prompts": work.lines(prompts),
    }
    return work.submit(store, owner, TASK, spec, refs)


def numbers(text: Any) -> list[float] | None:
    """Weights between commas or spaces; None when there are none. Raises LabError."""
    words = str(text or "")[:200].replace(",", " ").replace(";", " ").split()
    try:
        return [float(word) for word in words] or None
    except ValueError:
        raise LabError(f"Weights are numbers, as 0.5, 0.5, got '{str(text)[:40]}'.") from None
