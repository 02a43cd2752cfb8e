"""Compress and Merge jobs of the X-ray tab: what is shown of one, while it goes on and when it is done."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab import adapter_store
from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.methods import METHODS
from lab.plots import PLOTS, colour
from lab.runs import Comparison, Run, Store
from lab.ui import rendering
from lab.ui.files import address
from lab.ui.html import dot, e, empty, error, pill, size

TICK_S = 1.5
PROMPTS = ("a fox in the snow", "a red car on the beach")

NOTHING = {
    task: f'<div class="lab">{empty(title, text)}</div>'
    for task, title, text in (
        ("compress", "Nothing compressed yet", "Errors by layer, sizes, and pictures before and after appear here."),
        ("merge", "Nothing merged yet", "The merged adapter, its error and pictures of each appear here."),
    )
}


# -- before a job ----------------------------------------------------------------------------------------------
def prompts_for(store: Store, owner: str, ref: Any) -> str:
    """One a line: those of the run's comparison with its subject, else two that the embedded base knows."""
    try:
        found = adapter_store.chosen(store, owner, ref)
        spec = store.comparison(owner, found.comparison).spec if found.comparison else {}
    except LabError:
        spec = {}
    subject = f"{spec.get('trigger', '')} {spec.get('class_word', '')}".strip()
    lines = [p.replace("{subject}", subject) for p in spec.get("prompts", [])[:2] if isinstance(p, str)]
    return "\n".join(lines or PROMPTS)


def lines(text: Any) -> list[str]:
    return [line.strip() for line in str(text or "")[:4000].splitlines() if line.strip()]


def submit(store: Store, owner: str, task: str, spec: dict[str, Any], refs: list[Any]) -> str:
    """Queue a job on this owner's adapters; its id. Raises LabError."""
    from lab.tasks._adapters import as_inputs

    found = [adapter_store.chosen(store, owner, ref) for ref in refs]
    cid = store.submit(owner, task, spec | {"source": str(refs[0])[:100]}, [], as_inputs([c.path for c in found]))
    ensure_worker(store.home)
    return cid


# -- a job -------------------------------------------------------------------------------------------------------
def jobs(store: Store, owner: str, task: str) -> list[Comparison]:
    """This owner's jobs, the newest first."""
    return [c for c in store.comparisons(owner) if c.task == task]


def chooser(store: Store, owner: str, task: str, cid: str | None) -> Any:
    found = jobs(store, owner, task)
    titles = [(f"{len(found) - i}. {title(c)}", c.id) for i, c in enumerate(found)]
    known = {c.id for c in found}
    return gr.Dropdown(titles, value=cid if cid in known else None, visible=bool(found))


def title(found: Comparison) -> str:
    """What tells a job from others on the same adapter."""
    spec = found.spec
    budget = f" · {spec['budget']:,} at most" if spec.get("budget") else ""
    how = ", ".join(name(id, found) for id in spec["methods"]) if "methods" in spec else spec.get("how", "")
    return f"{spec.get('title', found.title)} · {how}{budget}"


def act(store: Store, owner: str, verb: Any, id: str) -> None:
    """Cancel or retry a run. Raises LabError, for a stranger's id as for one that does not exist."""
    if verb == "cancel":
        store.cancel(owner, id)
    elif verb == "retry":
        store.retry(owner, id)
        ensure_worker(store.home)
    else:
        raise LabError("There is no such action.")


def shown(store: Store, owner: str, task: str, cid: str | None) -> tuple[str, Any, Any]:
    """[HTML, plot of errors by layer, timer]."""
    if not cid:
        return NOTHING[task], gr.Plot(visible=False), gr.Timer(active=False)
    try:
        found = store.comparison(owner, cid)
    except LabError as problem:
        return f'<div class="lab">{error(str(problem))}</div>', gr.Plot(visible=False), gr.Timer(active=False)
    if found.task != task:
        return "", gr.Plot(visible=False), gr.Timer(active=False)
    done = [(run, result) for run in found.runs if (result := run.result()) and result.get("layers")]
    records = [
        {"method": run.method, "name": name(run.method, found), "layers": result["layers"]} for run, result in done
    ]
    plot = gr.Plot(PLOTS["compress-layers"].draw(records) if records else None, visible=bool(records))
    return job_html(found, done), plot, gr.Timer(active=any(not run.over for run in found.runs))


def name(method: str, found: Comparison) -> str:
    """What a column of a job is called."""
    if method in METHODS:
        return METHODS[method].name
    if method.startswith("adapter-") and method[8:].isdigit():
        names = found.spec.get("names", [])
        return str(names[int(method[8:]) - 1])[:60] if int(method[8:]) <= len(names) else method
    return {"base": "Base model", "original": "Original", "merged": "Merged"}.get(method, method)


def job_html(found: Comparison, done: list[tuple[Run, dict[str, Any]]]) -> str:
    parts = [f'<div class="headline"><h3>{e(found.spec.get("title", found.title))}</h3>{pill(found.state)}</div>']
    if any(run.state != "done" for run in found.runs):
        parts.append(
            f'<table class="data queue"><tbody>{"".join(queued(*pair) for pair in _named(found))}</tbody></table>'
        )
    if done:
        parts.append(_table(found, done))
    if found.spec.get("prompts") and any(run.state == "done" for run in found.runs):
        parts.append(_pictures(found))
    return f'<div class="lab xray-job">{"".join(parts)}</div>'


def _named(found: Comparison) -> list[tuple[Run, str]]:
    return [(run, name(run.method, found)) for run in found.runs]


def queued(run: Run, title: str = "") -> str:
    """A table's row of a run that is not done: how far it is, and what can be done about it."""
    title = title or (METHODS[run.method].name if run.method in METHODS else run.method)
    return (
        f'<tr data-run="{e(run.id)}" data-state="{e(run.state)}"><td class="name">{dot(run.method)}{e(title)}</td>'
        f'<td>{pill(run.state)}</td><td class="bar">{rendering.progress(run)}<small>{e(rendering.now(run)[:200])}</small></td>'
        f'<td><div class="acts">{rendering.acts(run)}</div></td></tr>'
    )


def _table(found: Comparison, done: list[tuple[Run, dict[str, Any]]]) -> str:
    first = done[0][1]
    before = [first["original"]] if "original" in first else first.get("adapters", [])
    whole = sum(b["parameters"] for b in before) or 1
    rows = [
        f'<tr><td class="name">{e(b["name"][:60])}<small>{e(b["kind"])}{_weight(b)}</small></td><td class="r num">{b["parameters"]:,}'
        f'</td><td class="r num">{size(b["bytes"])}</td><td class="r num">–</td><td class="r num">–</td><td></td></tr>'
        for b in before
    ]
    for run, result in done:
        share = f"<small>{result['parameters'] / whole:.1%}</small>" if "original" in result else ""
        distance = result.get("picture_distance")
        rows.append(
            f'<tr data-done="{e(run.method)}"><td class="name">{dot(run.method)}{e(name(run.method, found))}<small>{e(_how(result))}</small></td>'
            f'<td class="r num">{result["parameters"]:,}{share}</td><td class="r num">{size(result["bytes"])}</td>'
            f'<td class="r num">{_error(result)}</td><td class="r num">{"–" if distance is None else f"{distance:.4f}"}</td>'
            f"<td>{_links(run, result)}</td></tr>"
        )
    return (
        '<div class="scroll"><table class="data"><thead><tr><th>Adapter</th><th class="r">Parameters</th><th class="r">File</th>'
        '<th class="r" title="‖fit − ΔW‖/‖ΔW‖ over all layers, of the saved file">Relative error</th>'
        '<th class="r" title="half of 1 − cosine of CLIP\'s embeddings, pictures of the same prompts and seeds">Pictures apart</th>'
        f"<th>Take along</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _weight(before: dict[str, Any]) -> str:
    return f", weight {before['weight']:g}" if "weight" in before else ""


def _how(result: dict[str, Any]) -> str:
    if result.get("knobs"):
        numbers = {k: v for k, v in result["knobs"].items() if isinstance(v, int | float) and not isinstance(v, bool)}
        kept = ", ".join(f"{k} {v:g}" for k, v in numbers.items() if k in ("r", "k", "l", "r_outer", "r_inner"))
        ranks = [row["rank"] for row in result["layers"] if "rank" in row]
        return f"{f'ranks {min(ranks)} to {max(ranks)}' if ranks else kept}; {result['how']}"
    return f"{result['how']}, rank {result['rank']}"


def _error(result: dict[str, Any]) -> str:
    if result["relative_error"] < 1e-6:
        return f"{result['relative_error']:.0e}<small>exact but for rounding</small>"
    off = result.get("from_sum")
    apart = off is not None and abs(off - result["relative_error"]) > 1e-9
    return f"{result['relative_error']:.3g}" + (f"<small>{off:.3g} from the plain sum</small>" if apart else "")


def _links(run: Run, result: dict[str, Any]) -> str:
    links = [f'<a href="{address("runs", run.id, "adapter")}" download>PEFT</a>']
    for layout, lost in result.get("exports", {}).items():
        told = "" if lost < 1e-3 else f" <small>error {lost:.2g}</small>"
        links.append(f'<a href="{address("runs", run.id, layout)}" download>{e(layout)}</a>{told}')
    return " · ".join(links)


def _pictures(found: Comparison) -> str:
    """Rows are prompts, columns the base, what there was, and what was made; the same seeds everywhere."""
    columns = _named(found)
    head = "".join(f'<div class="col" style="--c:{colour(run.method)}">{e(title)}</div>' for run, title in columns)
    rows = []
    for p, prompt in enumerate(found.spec["prompts"]):
        cells = []
        for run, title in columns:
            pictures = "".join(
                f'<img data-zoom tabindex="0" loading="lazy" src="{address("runs", run.id, "samples", p, seed, v=1)}" '
                f'alt="{e(title)}: {e(prompt)}, seed {seed}">'
                for seed in found.spec["sample_seeds"]
                if run.state == "done" and (run.folder / "samples" / f"p{p}_s{seed}.png").is_file()
            )
            cells.append(f'<div class="pair">{pictures or "<span>not yet</span>"}</div>')
        rows.append(f'<div data-row><div class="prompt">{e(prompt)}</div>{"".join(cells)}</div>')
    return f'<div class="scroll"><div class="grid" data-zooms style="--n:{len(columns)}"><div></div>{head}{"".join(rows)}</div></div>'
