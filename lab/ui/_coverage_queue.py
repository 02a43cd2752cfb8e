"""Large layers of the Coverage tab: what is not measured yet goes to the queue, as anything that takes longer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab.coverage import report
from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.runs import Comparison, Store
from lab.ui._xray_jobs import act, queued

__all__ = ["act", "shown", "submit"]
TASK, TICK_S = "coverage", 1.5


def submit(store: Store, owner: str, asked: report.View) -> str:
    """Queue what the view lacks, unless it is queued already; the job's id. Raises LabError."""
    if going := job(store, owner, asked, going=True):
        return going.id
    cid = store.submit(owner, TASK, {"view": asked.link()}, [])
    ensure_worker(store.home)
    return cid


def job(store: Store, owner: str, asked: report.View, *, going: bool = False) -> Comparison | None:
    """This owner's latest job for these points (what is drawn and how does not matter); with `going`, one that is not
    over."""
    wanted = points_of(asked.link())
    for found in store.comparisons(owner):
        if found.task == TASK and points_of(found.spec["view"]) == wanted:
            return found if not going or any(not run.over for run in found.runs) else None
    return None


def points_of(link: dict[str, str]) -> tuple[Any, ...]:
    """What tells the points of a view from others': its address less how they are drawn. Span, freedom and rank are
    measured together."""
    asked = report.view(link)
    return asked.d, asked.methods, tuple(asked.wanted()), asked.start, asked.seed, asked.target


def shown(store: Store, owner: str, values: dict[str, Any]) -> tuple[Any, str, Any]:
    """[button, HTML of the job, timer] for the controls' values."""
    try:
        asked = report.view(values)
    except LabError:
        return gr.Button(visible=False), "", gr.Timer(active=False)
    left = len(report.missing(asked))
    found = job(store, owner, asked) if asked.large and left else None
    if found is None:
        return gr.Button(f"Measure {left} point{'s' * (left != 1)}", visible=left > 0), "", gr.Timer(active=False)
    going = any(not run.over for run in found.runs)
    rows = "".join(queued(run) for run in found.runs if run.state != "done")
    return gr.Button("Measure again", visible=not going), _html(rows, left), gr.Timer(active=going)


def _html(rows: str, left: int) -> str:
    table = f'<table class="data queue"><tbody>{rows}</tbody></table>' if rows else ""
    return f'<div class="lab coverage-job"><p>{left} point{"s" * (left != 1)} to go.</p>{table}</div>'


def link_of(store: Store, owner: str, cid: str | None) -> dict[str, str]:
    """The address of a job's view; {} for what is no job of this tab, or not this owner's."""
    try:
        found = store.comparison(owner, cid) if cid else None
    except LabError:
        return {}
    return found.spec["view"] if found and found.task == TASK else {}
