"""Compress, in the X-ray tab: the opened adapter fitted by smaller methods, without data."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab import adapter_store, base_weights
from lab.bases import BASES
from lab.compress import FITS
from lab.errors import LabError
from lab.runs import Store
from lab.ui import Page
from lab.ui import _xray_jobs as work
from lab.ui.html import error, sentences, view
from lab.ui.owner import owner_of

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
TITLE, TASK = "Compress", "compress"
INTRO = """<div class="lab xray-said"><p>The opened adapter written anew by a smaller method, without any training data: least
squares on ΔW, layer by layer. What comes out is an ordinary adapter of that method.</p></div>"""


def build(page: Page, parts: dict[str, Any]) -> None:
    """`parts` holds the tab's "opened" (the reference of the adapter shown) and "base" (the one chosen, or "")."""
    gr.HTML(INTRO, apply_default_css=False, js_on_load=None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=270):
            methods = gr.CheckboxGroup(
                [(fit.method.name, fit.id) for fit in FITS], value=["nora", "lora"], label="Methods",
                elem_id="xray-compress-methods",
            )  # fmt: skip
            budget = gr.Number(
                20_000, label="Parameters at most", info="Over all layers.", precision=0, minimum=1,
                elem_id="xray-compress-budget",
            )  # fmt: skip
            prompts = gr.Textbox(
                "\n".join(work.PROMPTS), label="Draw before and after", info="A prompt a line; none: no pictures.",
                lines=2, max_length=2000, elem_id="xray-compress-prompts",
            )  # fmt: skip
            start = gr.Button("Compress", variant="primary", elem_id="xray-compress-start")
            notice = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="xray-compress-notice")
        with gr.Column(scale=8, min_width=320):
            which = gr.Dropdown([], label="Shown", visible=False, elem_id="xray-compress-which")
            panel = view(work.NOTHING[TASK], apply_default_css=False, elem_id="xray-compress-panel")
            plot = gr.Plot(show_label=False, container=False, visible=False, elem_id="xray-compress-plot")
    timer = gr.Timer(work.TICK_S, active=False)
    _wire(page, parts, (methods, budget, prompts), start, notice, (which, panel, plot, timer))


def _wire(page: Page, parts: dict[str, Any], controls: Any, start: Any, notice: Any, views: Any) -> None:
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
        return fitting(store, owner_of(request), ref)

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
    parts["opened"].change(sentences(for_adapter), parts["opened"], [controls[1], controls[2], which], **QUIET)
    page.opened.change(sentences(elsewhere), page.opened, which, **QUIET)


# -- handlers: plain functions -----------------------------------------------------------------------------------
def submit(store: Store, owner: str, ref: Any, base: Any, methods: Any, budget: Any, prompts: Any) -> str:
    """Queue the job; its id. Raises LabError."""
    if not ref:
        raise LabError("No adapter is open: choose one above first.")
    found = adapter_store.chosen(store, owner, ref)
    spec = {
        "name": found.title,
        "base": base_of(found, base),
        "methods": {str(id): {} for id in methods or []},
        "budget": budget,
        "prompts": work.lines(prompts),
    }
    return work.submit(store, owner, TASK, spec, [ref])


def base_of(found: adapter_store.Chosen, base: Any) -> str:
    """The base that was chosen, or that the run was trained on; "" leaves it to the file. Only bases at hand."""
    if base:
        if base not in BASES or not base_weights.at_hand(BASES[base]):
            raise LabError("This base is not on this machine: choose another.")
        return str(base)
    return found.base if found.base in BASES and base_weights.at_hand(BASES[found.base]) else ""


def fitting(store: Store, owner: str, ref: Any) -> tuple[Any, Any, Any]:
    """[budget, prompts, chooser] for an adapter that was just opened: a quarter of its parameters, its own prompts, and
    its latest job."""
    if not ref:
        return gr.skip(), gr.skip(), work.chooser(store, owner, TASK, None)
    from lab.ui.xray import again

    try:
        quarter: Any = max(1, again(store, owner, ref, "")["parameters"] // 4)
    except LabError:
        quarter = gr.skip()
    last = next((c.id for c in work.jobs(store, owner, TASK) if c.spec.get("source") == ref), None)
    return quarter, work.prompts_for(store, owner, ref), work.chooser(store, owner, TASK, last)
