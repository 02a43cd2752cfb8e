"""The few-shot tab's lower half: runs going on, the table, plots, single runs, and a picture of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lab import datasets
from lab.clip import table
from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.plots import PLOTS
from lab.runs import Comparison, Run, Store
from lab.tasks.fewshot import name, parts
from lab.ui import Page
from lab.ui import _fewshot_html as html
from lab.ui.comparison import heading
from lab.ui.html import error, sentences, view
from lab.ui.owner import owner_of

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
TICK_S = 2.0
Record = dict[str, Any]


@dataclass
class Results:
    opened: gr.State  # id of the few-shot comparison that is shown


def build(page: Page) -> Results:
    opened, seen = gr.State(None), gr.State("")
    timer = gr.Timer(TICK_S, active=False)

    def plain(id: str) -> gr.HTML:
        return view(apply_default_css=False, elem_id=id)

    with gr.Column(visible=False, elem_id="fs-results") as whole:
        heading("Results")
        which = gr.Dropdown([], label="Comparison", elem_id="fs-which")
        queue = plain("fs-queue")
        curves = gr.Plot(show_label=False, container=False, elem_id="fs-curves")
        scores, written = plain("fs-table"), plain("fs-written")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                shots = gr.Plot(show_label=False, container=False, elem_id="fs-shots")
            with gr.Column(min_width=320):
                parameters = gr.Plot(show_label=False, container=False, elem_id="fs-parameters")
        heading("One run", "its classes, what it takes for what, and where it was most confidently wrong")
        one = gr.Dropdown([], label="Run", elem_id="fs-one")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                per_class = plain("fs-per-class")
            with gr.Column(min_width=320):
                confusion = gr.Plot(show_label=False, container=False, elem_id="fs-confusion")
        wrong = plain("fs-wrong")
        heading(
            "Your own picture",
            "the five likeliest classes by each method on the chosen run's dataset, with the most shots and the first seed",
        )
        with gr.Row(equal_height=False):
            own = gr.Image(
                type="filepath", label="Picture", height=220, sources=["upload", "clipboard"], elem_id="fs-own"
            )
            with gr.Column(scale=3):
                answers = plain("fs-answers")
    all_shown = [whole, which, queue, curves, scores, written, shots, parameters, one, timer, seen]
    details = [per_class, confusion, wrong]

    def refreshed(
        request: gr.Request, cid: str | None, before: str, picked: str | None, force: bool = True
    ) -> list[Any]:
        return refresh(page.store, owner_of(request), cid, "" if force else before, picked)

    def ticked(request: gr.Request, cid: str | None, before: str, picked: str | None) -> list[Any]:
        return refreshed(request, cid, before, picked, force=False)

    def landed(request: gr.Request) -> Any:
        asked = dict(request.query_params).get("fewshot")
        mine = comparisons(page.store, owner_of(request))
        return asked if asked in {c.id for c in mine} else (mine[0].id if mine else None)

    def acted(request: gr.Request, event: gr.EventData) -> Any:
        said = event._data or {}
        act(page.store, owner_of(request), said.get("do"), str(said.get("id") or ""))
        return gr.Timer(active=True)

    def opened_elsewhere(request: gr.Request, cid: str | None) -> Any:
        known = {c.id for c in comparisons(page.store, owner_of(request))}
        return cid if cid in known else gr.skip()

    def single(request: gr.Request, cid: str | None, picked: str | None) -> list[Any]:
        return one_run(page.store, owner_of(request), cid, picked)

    def answered(request: gr.Request, cid: str | None, path: str | None, picked: str | None) -> str:
        try:
            return try_picture(page.store, owner_of(request), cid, path, picked)
        except LabError as problem:
            return error(str(problem))

    again: dict[str, Any] = {
        "inputs": [opened, seen, one],
        "outputs": all_shown,
        "trigger_mode": "always_last",
        **QUIET,
    }
    opened.change(sentences(refreshed), **again).then(sentences(single), [opened, one], details, **QUIET)
    timer.tick(sentences(ticked), **again)
    which.input(lambda cid: cid, which, opened, **QUIET)
    queue.click(sentences(acted), None, timer, **QUIET)
    one.change(sentences(single), [opened, one], details, **QUIET)
    own.change(answered, [opened, own, one], answers, api_visibility="private", show_progress_on=answers)
    page.opened.change(sentences(opened_elsewhere), page.opened, opened, **QUIET)
    page.demo.load(sentences(landed), None, opened, **QUIET)
    return Results(opened)


# -- handlers: plain functions -------------------------------------------------------------------------------
def comparisons(store: Store, owner: str) -> list[Comparison]:
    """The owner's few-shot comparisons, newest first."""
    return sorted((c for c in store.comparisons(owner) if c.task == "fewshot"), key=lambda c: -c.created)


def records(comparison: Comparison) -> list[Record]:
    return table.records(run.as_dict() for run in comparison.runs if run.state == "done")


def refresh(store: Store, owner: str, cid: str | None, before: str, picked: str | None) -> list[Any]:
    """Everything that changed since `before` (a digest of what was shown). Raises LabError for a stranger's id."""
    if not cid:
        return [gr.Column(visible=False), *[gr.skip()] * 8, gr.Timer(active=False), ""]
    found = store.comparison(owner, cid)
    going = any(not run.over for run in found.runs)
    done = [run.id for run in found.runs if run.state == "done"]
    now = json.dumps([cid, len(done)])
    same = now == before
    results = [] if same else records(found)
    choices = [(f"{c.title}, {len(c.runs)} runs", c.id) for c in comparisons(store, owner)]
    fresh: list[Any] = [gr.skip()] * 5
    if not same:
        runs = run_choices(results)
        keep = picked if picked in {value for _, value in runs} else (runs[0][1] if runs else None)
        fresh = [
            html.results(results),
            html.written(found.spec),
            PLOTS["fewshot-shots"].draw(cells(results)),
            PLOTS["fewshot-parameters"].draw(points(results)),
            gr.Dropdown(runs, value=keep),
        ]
    return [
        gr.Column(visible=True),
        gr.skip() if same else gr.Dropdown(choices, value=cid),
        html.queue(found.runs),
        _validation(found, going) if going or not same else gr.skip(),
        *fresh,
        gr.Timer(active=going),
        now,
    ]


def _validation(comparison: Comparison, going: bool) -> gr.Plot:
    """The curves' chart; nothing once all is over and no method had a curve to draw."""
    lines = curves(comparison)
    return gr.Plot(PLOTS["fewshot-validation"].draw(lines), visible=going or bool(lines))


def curves(comparison: Comparison) -> list[Record]:
    """Validation accuracy of every run at its latest dataset and number of shots, as the plot takes it."""
    made = []
    for run in comparison.runs:
        lines = _lines(run)
        if not lines:
            continue
        shots = lines[-1]["shots"]
        last = [n for n in lines if (n["shots"], n.get("dataset")) == (shots, lines[-1].get("dataset"))]
        for rate in dict.fromkeys(line["rate"] for line in last):
            by_step = {n["step"]: n["accuracy"] for n in last if n["rate"] == rate}
            made.append(
                {"method": run.method, "name": f"{name(run.method)}, {shots} shots", "seed": run.seed,
                 "points": sorted(by_step.items())}
            )  # fmt: skip
    return made


def _lines(run: Run) -> list[Record]:
    path = run.folder / "validation.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line, while it is being written
            break
    return found


def cells(found: Sequence[Record]) -> list[Record]:
    """A record a method and number of shots, the mean over datasets: what the plot against shots takes."""
    return [
        {"method": row["method"], "name": row["name"], "shots": shots, "mean": made["mean"], "spread": made["spread"]}
        for row in table.rows(found)
        for shots, made in _by_shots(row).items()
    ]


def _by_shots(row: Record) -> dict[int, Record]:
    """A method's cell for each number of shots: of the only dataset, or the average where that is known."""
    several = len({name for name, _ in row["cells"]}) > 1
    return {shots: made for (name, shots), made in row["cells"].items() if not several or name == table.AVERAGE}


def points(found: Sequence[Record]) -> list[Record]:
    """A record a method at its most shots, the mean over datasets: what the plot against parameters takes."""
    made = []
    for row in table.rows(found):
        by_shots = _by_shots(row)
        if not by_shots:
            continue
        cell = by_shots[max(by_shots)]
        made.append(
            {"method": row["method"], "name": row["name"], "parameters": row["trainable_parameters"], "mean": cell["mean"],
             "spread": cell["spread"]}
        )  # fmt: skip
    return made


def run_choices(found: Sequence[Record]) -> list[tuple[str, str]]:
    several = len({r["dataset"] for r in found}) > 1
    ordered = sorted(found, key=lambda r: -r["accuracy"])
    return [
        (
            f"{r['name']}, {_dataset(r) if several else ''}{r['shots']} shots, seed {r['seed']}: {r['accuracy']:.1%}",
            _id(r),
        )
        for r in ordered
    ]


def _id(r: Record) -> str:
    return f"{r['method']} {r['seed']} {r['shots']} {r['dataset']}"


def _dataset(r: Record) -> str:
    return f"{datasets.resolve(r['dataset'], local=False).name}, "


def one_run(store: Store, owner: str, cid: str | None, picked: str | None) -> list[Any]:
    """Per-class accuracy, confusion matrix and most confidently wrong pictures of one run."""
    if not cid or not picked:
        return ["", PLOTS["fewshot-confusion"].draw([]), ""]
    found = store.comparison(owner, cid)
    for record in records(found):
        if _id(record) == picked:
            own = found.spec["classes"] if record["dataset"] == found.spec["dataset"] else None
            names = own or html._listing(record["dataset"]).classes
            matrix = PLOTS["fewshot-confusion"].draw([{"classes": names, "confusion": record["confusion"]}])
            return [html.per_class(record, names), matrix, html.wrong(record, names)]
    return ["", PLOTS["fewshot-confusion"].draw([]), ""]


def act(store: Store, owner: str, verb: Any, id: str) -> None:
    """Cancel or retry a run. Raises LabError, for a stranger's id as for one that does not exist."""
    if verb == "cancel":
        store.cancel(owner, id)
    elif verb == "retry":
        store.retry(owner, id)
        ensure_worker(store.home)
    else:
        raise LabError("There is no such action.")


def try_picture(store: Store, owner: str, cid: str | None, path: str | None, picked: str | None = None) -> str:
    """The five likeliest classes of this picture by every finished method, of the dataset of the picked run (or the
    comparison's first). Raises LabError."""
    from lab.uploads import decode

    if not path:
        return ""
    if not cid:
        raise LabError("Run a comparison first: its classifiers are what is asked.")
    found = store.comparison(owner, cid)
    done: dict[str, Run] = {}
    for run in sorted((r for r in found.runs if r.state == "done"), key=lambda r: r.seed):
        done.setdefault(run.method, run)
    if not done:
        raise LabError("No method has finished yet: try again when the first one has.")
    image = decode(path)
    from lab.clip.serve import top

    wanted = str(picked or "").partition(" ")[2].partition(" ")[2].partition(" ")[2]
    number = next((i for i, (own, _) in enumerate(parts(found.spec, store.home)) if own["dataset"] == wanted), 0)
    asked = [
        {"method": r.method, "seed": r.seed, "knobs": r.knobs, "folder": parts(found.spec, r.folder)[number][1]}
        for r in done.values()
    ]
    spec = parts(found.spec, store.home)[number][0]
    return html.answers(top(spec, asked, max(spec["shots"]), image))
