"""The Subject tab from Train on: queue, curves, previews, grid, table, downloads, refreshed by a timer."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from lab import compare
from lab.errors import LabError
from lab.plots import PLOTS
from lab.runs import Comparison, Store
from lab.ui import rendering as render
from lab.ui.html import e, error, view

TASK = "subject"
TICK_S = 1.5
CURVE_POINTS = 240


@dataclass
class Panel:
    """The components, in the order in which `shown` fills them."""

    head: gr.HTML
    queue: gr.HTML
    failures: gr.HTML
    loss: gr.Plot
    previews: gr.HTML
    results: gr.Column
    grid: gr.HTML
    over: gr.HTML
    table: gr.HTML
    verdicts: gr.HTML
    scores: gr.Plot
    tradeoff: gr.Plot
    downloads: gr.HTML

    def all(self) -> list[Any]:
        return list(vars(self).values())


@dataclass
class Choosers:
    """What the visitor looks at: training seed, picture seed, and the two columns of the overlay."""

    seed: gr.Radio
    picture_seed: gr.Radio
    left: gr.Dropdown
    right: gr.Dropdown
    prompt: gr.Dropdown

    def all(self) -> list[Any]:
        return list(vars(self).values())


def heading(text: str, hint: str = "") -> gr.HTML:
    return gr.HTML(
        f'<div class="lab step"><h2>{e(text)}</h2><p>{e(hint)}</p></div>', apply_default_css=False, js_on_load=None
    )


def build() -> tuple[Panel, Choosers]:
    def plain(id: str) -> gr.HTML:
        return view(apply_default_css=False, elem_id=id)

    head, queue, failures = plain("comparison-head"), plain("queue"), plain("failures")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            heading("Training loss", "moving average; the raw curve is faint")
            loss = gr.Plot(show_label=False, container=False, elem_id="loss")
        with gr.Column(scale=2, min_width=280):
            heading("Previews", "refreshed while it trains")
            previews = plain("previews")
    with gr.Column(visible=False, elem_id="results") as results:
        heading("Side by side", "same prompts, same seeds; click a picture to enlarge it")
        with gr.Row(elem_classes="seeds"):
            picture_seed = gr.Radio([], label="Picture seed", min_width=160, elem_id="picture-seed")
            seed = gr.Radio([], label="Training seed", min_width=160, elem_id="training-seed")
        grid = plain("grid")
        heading("Laid over each other", "drag the line")
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                left = gr.Dropdown([], label="Left", elem_id="over-left")
                right = gr.Dropdown([], label="Right", elem_id="over-right")
                prompt = gr.Dropdown([], label="Prompt", elem_id="over-prompt")
            with gr.Column(scale=2, min_width=300):
                over = plain("over")
        heading("In numbers", "mean ± standard deviation over training seeds")
        table, verdicts = plain("table"), plain("verdicts")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                scores = gr.Plot(show_label=False, container=False, elem_id="scores")
            with gr.Column(min_width=320):
                tradeoff = gr.Plot(show_label=False, container=False, elem_id="tradeoff")
        heading("Take it with you")
        downloads = plain("downloads")
    panel = Panel(
        head, queue, failures, loss, previews, results, grid, over, table, verdicts, scores, tradeoff, downloads
    )
    return panel, Choosers(seed, picture_seed, left, right, prompt)


# -- handlers: plain functions ---------------------------------------------------------------------------
def records(store: Store, owner: str, comparison: Comparison) -> list[dict[str, Any]]:
    """Loss curves of the comparison's training runs, as the plot takes them."""
    return [
        {
            "method": run.method,
            "name": render.name(run.method),
            "seed": run.seed,
            "losses": [
                (record["step"], record["loss"])
                for record in store.metrics(owner, run.id, CURVE_POINTS)
                if isinstance(record.get("loss"), (int, float))
            ],
        }
        for run in comparison.runs
        if run.method != "base" and run.attempt
    ]


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The results, one row a method."""
    return compare.table([run.as_dict() for run in comparison.runs])


def chosen(comparison: Comparison, given: dict[str, Any]) -> dict[str, Any]:
    """The choosers' values, replaced where they do not belong to this comparison."""
    columns, seeds = render.methods(comparison), render.seeds(comparison)
    pictures, prompts = comparison.spec["sample_seeds"], range(len(comparison.spec["prompts"]))
    trained = [m for m in columns if m != "base"]

    def one(name: str, allowed: Any, fallback: Any) -> Any:
        return given.get(name) if given.get(name) in allowed else fallback

    return {
        "seed": one("seed", seeds, seeds[0] if seeds else 0),
        "picture_seed": one("picture_seed", pictures, pictures[0]),
        "left": one("left", columns, columns[0]),
        "right": one("right", columns, trained[-1] if trained else columns[-1]),
        "prompt": one("prompt", prompts, 0),
    }


def choosers(comparison: Comparison, pick: dict[str, Any]) -> list[Any]:
    """Updates of the choosers for this comparison."""
    columns = [(render.name(m), m) for m in render.methods(comparison)]
    seeds, pictures = render.seeds(comparison), comparison.spec["sample_seeds"]
    prompts = [(render.prompt_text(comparison, i)[:90], i) for i in range(len(comparison.spec["prompts"]))]
    return [
        gr.Radio([(str(s), s) for s in seeds], value=pick["seed"], visible=len(seeds) > 1),
        gr.Radio([(str(s), s) for s in pictures], value=pick["picture_seed"], visible=len(pictures) > 1),
        gr.Dropdown(columns, value=pick["left"]),
        gr.Dropdown(columns, value=pick["right"]),
        gr.Dropdown(prompts, value=pick["prompt"]),
    ]


def contents(store: Store, owner: str, comparison: Comparison, pick: dict[str, Any]) -> dict[str, Any]:
    """What every part of the panel shows now: HTML text, or the data that its plot is drawn from."""
    failed = [run for run in comparison.runs if run.state == "failed"]
    logs = {run.id: store.log_tail(owner, run.id, 25) for run in failed}
    done = any(run.state == "done" for run in comparison.runs)
    table = rows(comparison) if done else []
    at = pick["seed"], pick["picture_seed"]
    return {
        "head": render.head(comparison),
        "queue": render.queue(comparison),
        "failures": render.failures(comparison, logs),
        "loss": {"records": records(store, owner, comparison), "steps": comparison.spec["steps"]},
        "previews": render.previews(comparison),
        "results": done,
        "grid": render.grid(comparison, *at) if done else "",
        "over": render.over(comparison, pick["left"], pick["right"], pick["prompt"], *at) if done else "",
        "table": render.results(table) if done else "",
        "verdicts": render.verdicts(table) if done else "",
        "scores": table,
        "tradeoff": table,
        "downloads": render.downloads(comparison),
    }


def updates(now: dict[str, Any], before: dict[str, int]) -> tuple[list[Any], dict[str, int]]:
    """Component updates for what changed since `before`, and the marks to compare with next time."""
    marks, found = {}, []
    for part, value in now.items():
        marks[part] = zlib.crc32(json.dumps(value, default=str).encode())
        if before.get(part) == marks[part]:
            found.append(gr.skip())
        elif part == "results":
            found.append(gr.Column(visible=value))
        elif part == "loss":
            found.append(PLOTS["loss"].draw(value["records"], steps=value["steps"]))
        elif part in ("scores", "tradeoff"):
            found.append(PLOTS[part].draw(value) if value else None)
        else:
            found.append(value)
    return found, marks


def unfinished(comparison: Comparison) -> bool:
    return any(not run.over for run in comparison.runs)


def act(store: Store, owner: str, comparison_id: str, event: dict[str, Any]) -> None:
    """Do what a button of the panel asks for. Raises LabError."""
    verb, id = event.get("do"), event.get("id")
    comparison = store.comparison(owner, comparison_id)
    if verb == "cancel":
        store.cancel(owner, str(id))
    elif verb == "retry":
        store.retry(owner, str(id))
    elif verb == "cancel-all":
        store.cancel_comparison(owner, comparison.id)
    elif verb == "retry-all":
        for run in comparison.runs:
            if run.state in ("failed", "cancelled"):
                store.retry(owner, run.id)
    else:
        raise LabError("There is no such action.")


def _gone(problem: LabError) -> list[Any]:
    """The panel in place of a comparison that is not there for this owner."""
    head = f'<div class="lab">{error(str(problem))}</div>'
    empty = {
        "head": head,
        "queue": "",
        "failures": "",
        "loss": None,
        "previews": "",
        "results": gr.Column(visible=False),
    }
    return [empty.get(field.name, gr.skip()) for field in fields(Panel)]


def opened(store: Store, owner: str, cid: str | None) -> list[Any]:
    """Everything, for a comparison that was just opened, or closed (None): visibility of setup and panel, the
    panel's parts, the choosers, the timer, the id for the address bar, the marks of what is shown."""
    nothing = [gr.skip()] * len(fields(Choosers))
    found, panel = None, [gr.skip()] * len(fields(Panel))
    try:
        found = store.comparison(owner, cid) if cid else None
    except LabError as problem:
        panel = _gone(problem)
    if found is None or found.task != TASK:  # closed, not there, or another tab's
        inside = bool(cid) and found is None
        sides = [gr.Column(visible=not inside), gr.Column(visible=inside)]
        return [*sides, *panel, *nothing, gr.Timer(active=False), "", {}]
    pick = chosen(found, {})
    fresh, marks = updates(contents(store, owner, found, pick), {})
    active = gr.Timer(active=unfinished(found))
    return [gr.Column(visible=False), gr.Column(visible=True), *fresh, *choosers(found, pick), active, found.id, marks]


def refreshed(store: Store, owner: str, cid: str | None, marks: dict[str, int], picked: dict[str, Any]) -> list[Any]:
    """What changed since `marks`: the panel's parts, the timer, the new marks."""
    unchanged = [gr.skip()] * len(fields(Panel))
    try:
        found = store.comparison(owner, cid) if cid else None
    except LabError as problem:
        return [*_gone(problem), gr.Timer(active=False), {}]
    if found is None or found.task != TASK:
        return [*unchanged, gr.Timer(active=False), marks]
    fresh, marks = updates(contents(store, owner, found, chosen(found, picked)), marks)
    return [*fresh, gr.Timer(active=unfinished(found)), marks]
