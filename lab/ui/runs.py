"""Runs tab: everything this browser has submitted; find, open, cancel, retry, delete, read the log."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.runs import STATES, Comparison, Run, Store
from lab.tasks import TASKS
from lab.ui import Page, Tab, discover
from lab.ui import rendering as render
from lab.ui.html import dot, e, empty, pill, sentences, size, view
from lab.ui.owner import owner_of

TICK_S = 3.0
LOG_LINES = 80
NEW = '<p style="margin-top:16px"><button class="act" data-do="new">Begin with some pictures</button></p>'
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(page: Page) -> None:
    store, tabs = page.store, {tab.id for tab in discover()}
    shown_log = gr.State(None)  # id of the run whose log is open
    timer = gr.Timer(TICK_S, active=False)
    with gr.Row(equal_height=True, visible=False) as search:
        text = gr.Textbox(
            label="Search", placeholder="subject, method or message", scale=3, max_length=200, min_width=260
        )
        state = gr.Dropdown([("any state", ""), *((s, s) for s in STATES)], value="", label="State", min_width=140)
        method = gr.Dropdown([("any method", "")], value="", label="Method", min_width=140, elem_id="runs-method")
    listing = view(apply_default_css=False, elem_id="runs")

    def list_runs(request: gr.Request, *given: Any) -> tuple[Any, Any, Any, Any]:
        owner = owner_of(request)
        found, going = list_html(store, owner, *given)
        mine = sorted({run.method for run in store.runs(owner)})
        choices = [("any method", ""), *((render.name(m), m) for m in mine)]
        return found, gr.Timer(active=going), gr.Dropdown(choices), gr.Row(visible=bool(mine))

    def clicked(request: gr.Request, log: str | None, event: gr.EventData) -> tuple[Any, Any, Any]:
        said = event._data or {}
        verb, id = said.get("do"), str(said.get("id") or "")
        if verb == "open":
            task = store.comparison(owner_of(request), id).task
            tab = getattr(TASKS[task], "tab", task) if task in TASKS else task
            return id, gr.Tabs(selected=tab if tab in tabs else "subject"), log
        if verb == "log":
            return gr.skip(), gr.skip(), None if log == id else id
        if verb == "new":
            return gr.skip(), gr.Tabs(selected="subject"), log
        act(store, owner_of(request), verb, id)
        return gr.skip(), gr.skip(), log

    filters = [text, state, method, shown_log]
    again: dict[str, Any] = {
        "fn": sentences(list_runs),
        "inputs": filters,
        "outputs": [listing, timer, method, search],
        "trigger_mode": "always_last",
        **QUIET,
    }
    gr.on([text.change, state.input, method.input, timer.tick], **again)
    listing.click(sentences(clicked), shown_log, [page.opened, page.tabs, shown_log], **QUIET).then(**again)
    if page.tab is not None:
        page.tab.select(**again)
    page.demo.load(**again)


# -- handlers: plain functions ---------------------------------------------------------------------------
def act(store: Store, owner: str, verb: Any, id: str) -> None:
    """Cancel, retry or delete. Raises LabError, for a stranger's id as for one that does not exist."""
    if verb == "cancel":
        store.cancel(owner, id)
    elif verb == "retry":
        store.retry(owner, id)
        ensure_worker(store.home)
    elif verb == "delete":
        store.delete(owner, id)
    else:
        raise LabError("There is no such action.")


def list_html(
    store: Store, owner: str, text: str | None, state: str | None, method: str | None, log: str | None = None
) -> tuple[str, bool]:
    """The owner's comparisons with the runs that match, as HTML, and whether any of them is still going."""
    everything = store.comparisons(owner)
    if not everything:
        return (
            '<div class="lab">'
            + empty("No runs yet", "A comparison that you train appears here, and stays when you close the page.", NEW)
            + "</div>",
            False,
        )
    kept = {run.id for run in store.runs(owner, state=state or None, method=method or None, text=text or None)}
    blocks = [_block(store, owner, c, [run for run in c.runs if run.id in kept], log) for c in everything]
    shown = "".join(b for b in blocks if b)
    going = any(not run.over for c in everything for run in c.runs)
    nothing = empty("Nothing matches", "No run fits this search: clear a filter.")
    return f'<div class="lab" style="display:grid;gap:18px">{shown or nothing}</div>', going


def _block(store: Store, owner: str, comparison: Comparison, runs: list[Run], log: str | None) -> str:
    if not runs:
        return ""
    spec, cid = comparison.spec, e(comparison.id)
    title = f"{spec.get('trigger', '')} {spec.get('class_word', comparison.title)}".strip()
    delete = (
        f'<details><summary class="act danger">Delete</summary> <button class="act danger" data-do="delete" data-id="{cid}">'
        f"Delete {len(comparison.runs)} runs and their files for good</button></details>"
    )
    facts = f"{_when(comparison.created)} · {len(comparison.runs)} runs · {size(comparison.bytes)}"
    rows = "".join(_row(run) + (_log(store, owner, run) if run.id == log else "") for run in runs)
    return (
        f'<section><div class="headline" style="margin-bottom:8px"><h2 style="font-size:17px">{e(title)}</h2>{pill(comparison.state)}'
        f'<small>{e(facts)}</small><span class="acts" style="margin-left:auto">'
        f'<button class="act" data-do="open" data-id="{cid}">Open</button>{delete}</span></div>'
        f'<div class="scroll"><table class="data queue"><tbody>{rows}</tbody></table></div></section>'
    )


def _row(run: Run) -> str:
    steps = f"{run.step:,} / {run.steps:,}" if run.steps and run.method != "base" else "–"
    seed = f"seed {run.seed}" if run.method != "base" else "untrained"
    log = f'<button class="act" data-do="log" data-id="{e(run.id)}">Log</button>' if run.attempt else ""
    return (
        f'<tr data-run="{e(run.id)}" data-state="{e(run.state)}"><td class="name">{dot(run.method)}{e(render.name(run.method))}<small>{seed}</small></td>'
        f'<td>{pill(run.state)}</td><td class="bar" style="width:40%">{render.progress(run)}<small>{e(render.now(run)[:200])}</small></td>'
        f'{render.fact("step", steps)}<td><div class="acts">{render.acts(run)}{log}</div></td></tr>'
    )


def _log(store: Store, owner: str, run: Run) -> str:
    lines = store.log_tail(owner, run.id, LOG_LINES) or "The log is empty."
    return f'<tr><td class="wide" colspan="5"><pre class="log">{e(lines)}</pre></td></tr>'


def _when(created: float) -> str:
    """How long ago, as far as it matters (times of day would need the visitor's time zone)."""
    passed = time.time() - created
    for limit, unit, one in ((60, "second", 1), (3600, "minute", 60), (86400, "hour", 3600)):
        if passed < limit:
            count = max(1, int(passed / one))
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return time.strftime("%d %B %Y", time.gmtime(created))


TAB = Tab("runs", "Runs", 40, build)
