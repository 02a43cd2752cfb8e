"""The Coverage tab: which updates a method reaches, NOLA's Figure 2 for any method.

The handlers wrap lab/coverage/report.py. Equations are measured in the page's process with NumPy, in a fraction of a second
a curve; other methods by a short-lived process that imports torch, one at a time, with what is there already shown. Beyond
d = 32 a button sends what nobody has measured yet to the queue (`_coverage_queue`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import gradio as gr

from lab.coverage import TOLERANCE, curves, fit, report
from lab.errors import LabError
from lab.methods import METHODS
from lab.plots import PLOTS
from lab.ui import Page, Tab
from lab.ui import _coverage_queue as queue
from lab.ui.html import dot, e, error, sentences, static, view
from lab.ui.owner import owner_of

SCALES = {  # how the base's weight stands to the target: NoRA and DoRA depend on it
    "real": " W and ΔW have the sizes they have in the model.",
    "": " The target has norm 1, W about √d: NoRA has to undo its subtracted start, which costs it rank.",
}
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
NAMES = ("d", "m", "upto", "n", "show", "a0", "log", "seed")
INTRO = """<div class="lab coverage-intro"><h2>Which updates can a method reach?</h2>
<p>One d×d layer, n trained parameters. Lines are closed forms, points are measured on random updates.</p></div>"""
SAYS = {
    "coverage": "The dimension of the smallest space that holds every update the method can make, as a share of d². A method"
    " that spans everything still reaches only a thin curved part of it: see its degrees of freedom.",
    "local": "In how many independent directions an update can move when the trained numbers move a little. It never exceeds"
    " n, and falls short of n where several settings of the numbers give one update.",
    "rank": "The matrix rank of one random update.",
    "error": "How near the method comes to {target}, as a share of its norm: exact by singular values or least squares where"
    " that is possible, else the best of several descents (an upper bound).",
}


def build(page: Page) -> None:
    gr.HTML(f"<style>{static('coverage.css')}</style>{INTRO}", apply_default_css=False, js_on_load=None)
    with gr.Row(equal_height=False, elem_id="coverage"):
        with gr.Column(scale=3, min_width=270, elem_id="coverage-controls"):
            controls = _controls()
        with gr.Column(scale=8, min_width=320):
            show = gr.Radio(
                [(name, id) for id, name in report.WHAT.items()], value="coverage", show_label=False, container=False,
                elem_id="coverage-show",
            )  # fmt: skip
            plot = gr.Plot(show_label=False, container=False, elem_id="coverage-plot")
            said = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="coverage-said")
            measure = gr.Button("Measure", visible=False, size="sm", elem_id="coverage-measure")
            job = view(apply_default_css=False, elem_id="coverage-job")
            table = gr.HTML(apply_default_css=False, js_on_load=static("coverage.js"), elem_id="coverage-table")
    controls = {name: {**controls, "show": show}[name] for name in NAMES}
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=270):
            gr.HTML(_about_spectra(), apply_default_css=False, js_on_load=None)
            which = gr.Dropdown([], label="Point", elem_id="coverage-point", filterable=True)
        with gr.Column(scale=8, min_width=320):
            spectrum = gr.Plot(show_label=False, container=False, elem_id="coverage-spectrum")
    _wire(page, controls, [plot, said, table, which], [measure, job, gr.Timer(queue.TICK_S, active=False)], spectrum)


def _controls() -> dict[str, Any]:
    made: dict[str, Any] = {}
    rows = sorted(((m.name, m.id) for m in METHODS), key=lambda pair: pair[0].lower())
    made["m"] = gr.Dropdown(
        rows,
        value=list(report.DEFAULT_METHODS),
        label="Methods",
        multiselect=True,
        filterable=True,
        elem_id="coverage-m",
    )
    made["d"] = gr.Slider(2, curves.MAX_D, value=16, step=1, label="Side d of the layer", elem_id="coverage-d")
    made["upto"] = gr.Slider(
        0.05, 1.5, value=1.0, step=0.05, label="Parameters up to", info="As a share of d².", elem_id="coverage-upto"
    )
    made["n"] = gr.Textbox(
        "", label="Or these parameter counts", placeholder="8, 16, 32", max_length=400, elem_id="coverage-n"
    )
    with gr.Group():
        made["a0"] = gr.Checkbox(
            False,
            label="NOLA with its frozen A₀",
            info="As its authors train it; Figure 2 is without.",
            elem_id="coverage-a0",
        )
        made["log"] = gr.Checkbox(False, label="Logarithmic axis", elem_id="coverage-log")
    made["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="coverage-seed")
    return made


def _about_spectra() -> str:
    return (
        '<div class="lab coverage-side"><h3>Behind a point</h3><p>Every number above counts singular values, in double'
        f" precision, above {TOLERANCE:.0e} of the largest. A count can be trusted where the values fall off a cliff there.</p></div>"
    )


def _wire(page: Page, controls: dict[str, Any], shows: list[Any], queued: list[Any], spectrum: Any) -> None:
    inputs, which = list(controls.values()), shows[3]
    link, shown = gr.JSON(visible=False), gr.State(False)
    views = [*shows, link]

    def draw(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        owner_of(request)
        yield from drawn(dict(zip(NAMES, values, strict=True)))

    def first(request: gr.Request, before: bool, *values: Any) -> Iterator[list[Any]]:
        if before:
            yield [*[gr.skip()] * len(views), True]
            return
        for answer in draw(request, *values):
            yield [*answer, True]

    def behind(request: gr.Request, picked: str | None, *values: Any) -> Any:
        owner_of(request)
        return one_spectrum(dict(zip(NAMES, values, strict=True)), picked)

    def land(request: gr.Request) -> list[Any]:
        return landed(dict(request.query_params))

    changed = [
        *(controls[k].input for k in ("m", "show", "a0", "log")),
        controls["d"].release,
        controls["upto"].release,
        *(event for k in ("n", "seed") for event in (controls[k].submit, controls[k].blur)),
    ]
    store, (measure, job, timer) = page.store, queued

    def told(request: gr.Request, *values: Any) -> tuple[Any, str, Any]:
        return queue.shown(store, owner_of(request), dict(zip(NAMES, values, strict=True)))

    def drawing(event: Any) -> None:
        """What follows a drawing: the address, and what the queue has to do with it."""
        to_address = "(link) => { if (link) window.lab.params('coverage', link); }"
        event.then(None, link, None, js=to_address).then(sentences(told), inputs, queued, **QUIET)

    drawing(gr.on(changed, draw, inputs, views, trigger_mode="always_last", concurrency_limit=2, **QUIET))
    opened = page.tab.select if page.tab else page.demo.load
    drawing(opened(first, [shown, *inputs], [*views, shown], concurrency_limit=2, **QUIET))
    which.change(behind, [which, *inputs], spectrum, trigger_mode="always_last", **QUIET)
    landing = page.demo.load(land, None, [*inputs, shown], **QUIET)
    drawing(landing.then(landed_draw(draw), inputs, views, concurrency_limit=2, **QUIET))

    def begin(request: gr.Request, *values: Any) -> tuple[Any, str, Any]:
        queue.submit(store, owner_of(request), report.view(dict(zip(NAMES, values, strict=True))))
        return told(request, *values)

    def acted(request: gr.Request, event: gr.EventData) -> Any:
        said = event._data or {}
        queue.act(store, owner_of(request), said.get("do"), str(said.get("id") or ""))
        return gr.Timer(active=True)

    def elsewhere(request: gr.Request, cid: str | None) -> list[Any]:
        link = queue.link_of(store, owner_of(request), cid)
        return [*landed({"tab": "coverage", **link}), cid] if link else [gr.skip()] * (len(NAMES) + 2)

    measure.click(sentences(begin), inputs, queued, **QUIET)
    job.click(sentences(acted), None, timer, **QUIET)
    timer.tick(draw, inputs, views, concurrency_limit=2, **QUIET).then(sentences(told), inputs, queued, **QUIET)
    from_list = gr.State(None)
    page.opened.change(elsewhere, page.opened, [*inputs, shown, from_list], **QUIET)
    drawing(from_list.change(draw, inputs, views, concurrency_limit=2, **QUIET))


def landed_draw(draw: Any) -> Any:
    """The first drawing when the address opened this tab; for other tabs the tab's own selection draws."""

    def drawn_on_landing(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        if dict(request.query_params).get("tab") == "coverage":
            yield from draw(request, *values)
        else:
            yield [gr.skip()] * 5

    return drawn_on_landing


# -- what the handlers wrap: plain values in, what the components take out -----------------------------------------
def landed(query: dict[str, str]) -> list[Any]:
    """The controls' values for an address, and whether it opens this tab; left alone when it does not, or does not fit."""
    if query.get("tab") != "coverage":
        return [*[gr.skip()] * len(NAMES), False]
    try:
        asked = report.view({k: v for k, v in query.items() if k in NAMES})
    except LabError as problem:
        gr.Warning(str(problem))
        return [*[gr.skip()] * len(NAMES), True]
    values = {
        "d": asked.d, "m": list(asked.methods), "upto": asked.share, "n": ", ".join(map(str, asked.counts)),
        "show": asked.what, "a0": asked.start, "log": asked.log, "seed": asked.seed,
    }  # fmt: skip
    return [*(values[name] for name in NAMES), True]


def drawn(values: dict[str, Any]) -> Iterator[list[Any]]:
    """[plot, sentence, table, points to choose, address] again and again while points come in."""
    try:
        asked = report.view(values)
        for answer in report.answers(asked):
            figure = PLOTS["coverage"].draw(answer.drawn, what=asked.kind, log=asked.log, d=asked.d)
            yield [
                figure,
                sentence(answer),
                gr.skip() if answer.running else rows_table(answer),
                gr.skip() if answer.running else choices(answer),
                gr.skip() if answer.running else asked.link(),
            ]
    except LabError as problem:
        yield [gr.skip(), error(str(problem)), gr.skip(), gr.skip(), gr.skip()]


def sentence(answer: report.Answer) -> str:
    """What is shown, in words, and what is being measured or could not be."""
    notes = "".join(f"<p>{dot(id)} {e(METHODS[id].name)}: {e(text)}</p>" for id, text in answer.notes.items())
    busy = f'<p class="busy">Measuring {e(answer.running)} …</p>' if answer.running else ""
    said, target = SAYS[answer.view.kind], answer.view.target
    if target:
        said = said.format(target=fit.TARGETS[target]) + SCALES.get(target, SCALES[""])
    return f'<div class="lab coverage-said"><p>{e(said)}</p>{notes}{busy}</div>'


def choices(answer: report.Answer) -> Any:
    """The dropdown of points whose spectra can be seen; the middle one of the first method at first."""
    if answer.view.target:
        return gr.Dropdown([], value=None)
    found = [(f"{r['name']}, n = {r['trainable_parameters']:,}", f"{r['method']} {r['params']}") for r in answer.rows]
    first = [value for _, value in found if value.split()[0] == answer.rows[0]["method"]] if found else []
    return gr.Dropdown(found, value=first[len(first) // 3] if first else None)


def one_spectrum(values: dict[str, Any], picked: str | None) -> Any:
    try:
        asked = report.view(values)
        id, _, n = (picked or "").partition(" ")
        if id not in METHODS or not n.isdigit() or asked.target:
            return PLOTS["coverage-spectrum"].draw([])
        return PLOTS["coverage-spectrum"].draw([report.spectrum(asked, id, int(n))], tolerance=TOLERANCE)
    except LabError:
        return PLOTS["coverage-spectrum"].draw([])


def rows_table(answer: report.Answer) -> str:
    """The measured points with their closed forms, and the files and lines to take along."""
    if not answer.rows:
        return ""
    fitted = bool(answer.view.target)
    head = (
        ("n", "error", "how")
        if fitted
        else ("n", "span", "closed form", "freedom", "closed form", "rank", "closed form")
    )
    cells = "".join(f"<th{'' if name == 'how' else ' class=r'}>{e(name)}</th>" for name in head)
    body = "".join(_row(r, fitted) for r in answer.rows)
    taken = base64.b64encode(report.as_csv(answer).encode()).decode()
    name = f"coverage-d{answer.view.d}-{answer.view.what}"
    return (
        f'<div class="lab coverage-rows"><div class="take"><a class="act" download="{e(name)}.csv" '
        f'href="data:text/csv;base64,{taken}">CSV</a>'
        f'<button type="button" class="act" data-png="coverage-plot" data-name="{e(name)}.png">PNG</button>'
        f"<code>{e(answer.view.command())}</code></div>"
        f'<details><summary>All {len(answer.rows)} points</summary><div class="scroll"><table class="data"><thead><tr>'
        f"<th>Method</th>{cells}<th>Settings</th></tr></thead><tbody>{body}</tbody></table></div></details></div>"
    )


def _row(r: dict[str, Any], fitted: bool) -> str:
    def pair(measured: Any, closed: Any) -> str:
        agree = "" if closed is None else (" same" if measured == closed else " other")
        shown = ["–" if v is None else f"{v:,}" for v in (measured, closed)]
        return f'<td class="r num">{shown[0]}</td><td class="r num{agree}">{shown[1]}</td>'

    start = f'<tr><td class="name">{dot(r["method"])}{e(r["name"])}</td><td class="r num">{r["trainable_parameters"]:,}</td>'
    end = f"<td><small>{e(report.words(r))}</small></td></tr>"
    if fitted:
        value = "–" if r.get("error") is None else f"{r['error']:.4f}"
        return f'{start}<td class="r num">{value}</td><td><small>{e(r.get("fitted_by") or r["note"])}</small></td>{end}'
    middle = pair(r["rank"], r["closed_form_rank"]) + pair(r["local_dimension"], r["local_closed_form"])
    return start + middle + pair(r["update_rank"], r["update_rank_closed_form"]) + end


TAB = Tab("coverage", "Coverage", 35, build)
