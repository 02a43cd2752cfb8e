"""The X-ray tab: any adapter, layer by layer; overlap with others; Compress and Merge below.

An adapter is opened and measured by a process of its own (lab/xray/apart.py): the page's handlers wait for its lines and
show how far it is. A reference ("run:<id>", "file:<id>") is looked up with the cookie's owner in every handler.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from lab import adapter_store, base_weights
from lab.adapter_store import Adapters, Chosen
from lab.bases import BASES
from lab.errors import LabError
from lab.plots import PLOTS
from lab.runs import Store
from lab.ui import Page, Tab, _xray_compress, _xray_merge
from lab.ui import _xray_html as html
from lab.ui.files import slug
from lab.ui.html import error, sentences, static, view
from lab.ui.owner import owner_of
from lab.xray import apart

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
HEAVY: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "xray", **QUIET}
SHOWN = [("norm", "norm"), ("effective rank", "effective_rank"), ("share of energy", "energy"),
         ("in W's top directions", "top"), ("intruders", "intruders")]  # fmt: skip
OWN_BASE = "its own"
MOST = 6  # adapters beside the opened one


def build(page: Page) -> None:
    gr.HTML(f"<style>{static('xray.css')}</style>{html.INTRO}", apply_default_css=False, js_on_load=None)
    parts: dict[str, Any] = {"opened": gr.State("")}
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=270):
            parts["ref"] = gr.Dropdown([], label="Adapter", info="Your runs and files.", elem_id="xray-adapter")
            parts["sent"] = gr.File(
                label="Or send a file", file_count="multiple",
                height=130, elem_id="xray-upload",
            )  # fmt: skip
            parts["base"] = gr.Dropdown(
                [(OWN_BASE, "")], value="", label="Base", info="Whose weights it is laid on.", elem_id="xray-base"
            )
            parts["notice"] = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="xray-notice")
        with gr.Column(scale=8, min_width=320):
            parts["facts"] = gr.HTML(_lab(html.NOTHING), apply_default_css=False, js_on_load=None, elem_id="xray-facts")
    with gr.Column(visible=False, elem_id="xray-results") as parts["results"]:
        _views(parts)
        _sections(page, parts)
    _wire(page, parts)


def _views(parts: dict[str, Any]) -> None:
    parts["show"] = gr.Radio(SHOWN, value="norm", show_label=False, container=False, elem_id="xray-show")
    parts["map"] = gr.Plot(show_label=False, container=False, elem_id="xray-map")
    parts["said"] = gr.HTML(html.said("norm"), apply_default_css=False, js_on_load=None)
    parts["take"] = gr.HTML(apply_default_css=False, js_on_load=static("coverage.js"), elem_id="xray-take")
    gr.HTML('<div class="lab xray-said"><h3>Layers that move most</h3></div>', apply_default_css=False, js_on_load=None)
    parts["table"] = view(apply_default_css=False, elem_id="xray-table")
    parts["layer"] = gr.Dropdown([], label="Layer", filterable=True, elem_id="xray-layer")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            parts["spectrum"] = gr.Plot(show_label=False, container=False, elem_id="xray-spectrum")
        with gr.Column(min_width=320):
            parts["subspace"] = gr.Plot(show_label=False, container=False, elem_id="xray-subspace")
    parts["words"] = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="xray-words")


def _sections(page: Page, parts: dict[str, Any]) -> None:
    with gr.Accordion("Overlap with other adapters", open=False, elem_id="xray-overlap-section"):
        with gr.Row(equal_height=True):
            parts["others"] = gr.Dropdown(
                [], multiselect=True, max_choices=MOST, label="Compare with", elem_id="xray-others", scale=4,
                info="Other seeds and methods of its comparison come first.",
            )  # fmt: skip
            parts["side"] = gr.Radio(
                [("outputs", "outputs"), ("inputs", "inputs"), ("cosine", "cosine")], value="outputs",
                label="Show", elem_id="xray-side", scale=2,
            )  # fmt: skip
        parts["overlap-said"] = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="xray-overlap-said")
        parts["matrix"] = gr.Plot(show_label=False, container=False, visible=False, elem_id="xray-matrix")
        parts["overlap-map"] = gr.Plot(show_label=False, container=False, visible=False, elem_id="xray-overlap-map")
    for section in (_xray_compress, _xray_merge):
        with gr.Accordion(section.TITLE, open=False, elem_id=f"xray-{section.TASK}"):
            section.build(page, parts)


def _lab(inner: str) -> str:
    return f'<div class="lab">{inner}</div>'


def _wire(page: Page, parts: dict[str, Any]) -> None:
    store = page.store
    layer_views = [parts[k] for k in ("layer", "spectrum", "subspace", "words", "table")]
    views = [parts[k] for k in ("facts", "results", "opened", "map", "said", "take", "others")] + layer_views
    chosen = [parts["ref"], parts["base"]]

    def refreshed(request: gr.Request, ref: str | None, base: str | None) -> tuple[Any, Any]:
        return adapters(store, owner_of(request), ref), bases(base)

    def landed(request: gr.Request) -> tuple[Any, Any]:
        query = dict(request.query_params)
        asked = query.get("adapter") if query.get("tab") == "xray" else None
        return adapters(store, owner_of(request), asked), bases("")

    def uploaded(request: gr.Request, paths: list[str] | None) -> tuple[Any, Any, str]:
        if not paths:
            return gr.skip(), gr.skip(), ""
        owner = owner_of(request)
        try:
            ref = keep(store, owner, paths)
        except LabError as problem:
            return gr.skip(), None, _lab(error(str(problem)))
        return adapters(store, owner, ref), None, ""

    def open_(request: gr.Request, ref: str | None, base: str | None, show: str) -> Iterator[list[Any]]:
        yield from opened(store, owner_of(request), ref, base, show)

    def layer_(request: gr.Request, ref: str | None, base: str | None, layer: str | None) -> list[Any]:
        return of_layer(again(store, owner_of(request), ref, base), layer)

    def row(request: gr.Request, ref: str | None, base: str | None, event: gr.EventData) -> list[Any]:
        return layer_(request, ref, base, str((event._data or {}).get("id") or ""))

    def map_(request: gr.Request, ref: str | None, base: str | None, show: str) -> tuple[Any, str]:
        result = again(store, owner_of(request), ref, base)
        return PLOTS["xray-map"].draw(result["layers"], show=_one(show)), html.said(_one(show))

    def overlap_(request: gr.Request, ref: str, base: str, others: list[str], side: str) -> Iterator[list[Any]]:
        yield from overlapped(store, owner_of(request), ref, base, others, side)

    to_address = "(ref) => { if (ref) window.lab.params('xray', {adapter: ref}); }"
    parts["sent"].upload(
        sentences(uploaded), parts["sent"], [parts["ref"], parts["sent"], parts["notice"]],
        api_visibility="private", show_progress_on=parts["sent"],
    )  # fmt: skip
    gr.on(
        [parts["ref"].change, parts["base"].input], open_, [*chosen, parts["show"]], views,
        trigger_mode="always_last", **HEAVY,
    ).then(None, parts["ref"], None, js=to_address)  # fmt: skip
    shown = [parts["opened"], parts["base"]]
    parts["show"].input(sentences(map_), [*shown, parts["show"]], [parts["map"], parts["said"]], **HEAVY)
    parts["layer"].input(sentences(layer_), [*shown, parts["layer"]], layer_views, **HEAVY)
    parts["table"].click(sentences(row), shown, layer_views, **HEAVY)
    gr.on(
        [parts["others"].input, parts["side"].input], overlap_, [*shown, parts["others"], parts["side"]],
        [parts[k] for k in ("overlap-said", "matrix", "overlap-map")], trigger_mode="always_last", **HEAVY,
    )  # fmt: skip
    if page.tab is not None:
        page.tab.select(sentences(refreshed), chosen, chosen, **QUIET)
    page.demo.load(sentences(landed), None, chosen, **QUIET)


# -- handlers: plain functions -------------------------------------------------------------------------------
def adapters(store: Store, owner: str, ref: Any) -> Any:
    """The dropdown of everything that this owner can open, at this one if it is theirs."""
    found = adapter_store.choices(store, owner)
    return gr.Dropdown([(c.title, c.ref) for c in found], value=ref if ref in {c.ref for c in found} else None)


def bases(picked: Any) -> Any:
    """The dropdown of registered bases whose weights are on this machine."""
    here = [(row.name, row.id) for row in BASES if base_weights.at_hand(row)]
    return gr.Dropdown([(OWN_BASE, ""), *here], value=picked if picked in {id for _, id in here} else "")


def keep(store: Store, owner: str, paths: list[str]) -> str:
    """Keep what was uploaded and return its reference. Raises LabError."""
    if len(paths) > 4:
        raise LabError(f"{len(paths)} files were sent: send one adapter at a time.")
    return Adapters(store.home, owner).add([(Path(p), Path(p).name) for p in paths])


def source(found: Chosen, base: Any) -> apart.Source:
    """What to open, on the base that was chosen, or the one that the run was trained on if it is at hand."""
    if base:
        if base not in BASES or not base_weights.at_hand(BASES[base]):
            raise LabError("This base is not on this machine: choose another.")
        return apart.Source(found.path, found.title, base)
    trained = found.base if found.base in BASES and base_weights.at_hand(BASES[found.base]) else ""
    return apart.Source(found.path, found.title, trained)


def again(store: Store, owner: str, ref: Any, base: Any) -> dict[str, Any]:
    """The result for an adapter that was opened before (from memory; measured anew if it is no longer there)."""
    steps = list(apart.analyse(source(adapter_store.chosen(store, owner, ref), base)))
    assert steps[-1].result is not None
    return steps[-1].result


def opened(store: Store, owner: str, ref: Any, base: Any, show: str) -> Iterator[list[Any]]:
    """[facts, results, opened, map, said, take, others, and the layer's views] again and again while it is measured."""
    rest = [gr.skip()] * 11
    if not ref:
        yield [_lab(html.NOTHING), gr.Column(visible=False), "", *rest[2:]]
        return
    try:
        found = adapter_store.chosen(store, owner, ref)
        result: dict[str, Any] = {}
        for step in apart.analyse(source(found, base)):
            if step.result is None:
                yield [html.busy(step.what, step.done, step.total), *rest]
            else:
                result = step.result
    except LabError as problem:
        yield [_lab(error(str(problem))), gr.Column(visible=False), "", *rest[2:]]
        return
    first = max(result["layers"], key=lambda row: row["norm"])["layer"]
    yield [
        html.facts(result, found.title),
        gr.Column(visible=True),
        ref,
        PLOTS["xray-map"].draw(result["layers"], show=_one(show)),
        html.said(_one(show)),
        html.take(result, slug(found.title)),
        others(store, owner, found),
        *of_layer(result, first),
    ]


def _one(show: Any) -> str:
    return show if show in dict(SHOWN).values() else "norm"


def others(store: Store, owner: str, found: Chosen) -> Any:
    """The dropdown of what can be laid beside it: first the other runs of its comparison."""
    near = adapter_store.siblings(store, owner, found)
    known = {c.ref for c in near} | {found.ref}
    rest = [c for c in adapter_store.choices(store, owner) if c.ref not in known]
    return gr.Dropdown([(c.title, c.ref) for c in [*near, *rest]], value=[])


def of_layer(result: dict[str, Any], layer: Any) -> list[Any]:
    """[dropdown, spectrum, subspace, words, table] for one layer; the one that moves most when there is no such layer."""
    rows = {row["layer"]: row for row in result["layers"]}
    found = rows.get(layer) or max(rows.values(), key=lambda row: row["norm"])
    name = found["layer"]
    records = [{"name": name, "spectrum": found["spectrum"], "effective_rank": found["effective_rank"]}]
    return [
        gr.Dropdown(list(rows), value=name),
        PLOTS["xray-spectrum"].draw(records),
        PLOTS["xray-subspace"].draw([found]),
        html.layer(found),
        html.table(result, name),
    ]


def overlapped(store: Store, owner: str, ref: Any, base: Any, picked: Any, side: Any) -> Iterator[list[Any]]:
    """[words, matrix, map of the first pair] again and again while it is measured."""
    hidden = gr.Plot(visible=False)
    if not picked:
        yield ["", hidden, hidden]
        return
    side = side if side in ("outputs", "inputs", "cosine") else "outputs"
    try:
        chosen = [adapter_store.chosen(store, owner, r) for r in [ref, *list(picked)[:MOST]]]
        result: dict[str, Any] = {}
        for step in apart.compare([source(c, base) for c in chosen]):
            if step.result is None:
                yield [html.busy(step.what, step.done, step.total), gr.skip(), gr.skip()]
            else:
                result = step.result
    except LabError as problem:
        yield [_lab(error(str(problem))), hidden, hidden]
        return
    pairs, many = result["pairs"], len(result["names"]) > 2
    matrix = PLOTS["xray-overlap"].draw(pairs, names=result["names"], show=side) if many else None
    layers = PLOTS["xray-map"].draw(pairs[0]["layers"], show=side)
    yield [html.overlap(result), gr.Plot(matrix, visible=many), gr.Plot(layers, visible=True)]


TAB = Tab("xray", "X-ray", 36, build)
