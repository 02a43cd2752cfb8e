"""A comparison as HTML: queue, previews, grid, overlay, results, downloads. Pure functions of what the store says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lab.compare import name
from lab.methods import METHODS
from lab.plots import colour
from lab.runs import Comparison, Run
from lab.ui.files import address, version
from lab.ui.html import dot, duration, e, error, pill, size


def methods(comparison: Comparison) -> list[str]:
    """The comparison's columns in order: the base first."""
    return list(dict.fromkeys(run.method for run in comparison.runs))


def seeds(comparison: Comparison) -> list[int]:
    """Training seeds."""
    return sorted({run.seed for run in comparison.runs if run.method != "base"})


def run_of(comparison: Comparison, method: str, seed: int) -> Run | None:
    """The method's run with this training seed; the base has one run for all."""
    found = [run for run in comparison.runs if run.method == method]
    return next((run for run in found if run.seed == seed or method == "base"), found[0] if found else None)


# -- queue ---------------------------------------------------------------------------------------------
def head(comparison: Comparison) -> str:
    spec = comparison.spec
    over = all(run.over for run in comparison.runs)
    done = sum(run.state == "done" for run in comparison.runs)
    facts = [
        f"{spec.get('pictures') or '–'} pictures",
        f"{spec['steps']:,} steps × batch {spec['batch']}",
        f"training seeds {', '.join(map(str, spec['seeds']))}",
        f"{done} of {len(comparison.runs)} runs done",
    ]
    acts = "" if over else '<button class="act danger" data-do="cancel-all">Cancel all</button>'
    if over and any(run.state in ("failed", "cancelled") for run in comparison.runs):
        acts = '<button class="act" data-do="retry-all">Retry what is not done</button>'
    title = f"{spec['trigger']} {spec['class_word']}".strip()
    mine = "".join(
        f'<img data-zoom tabindex="0" loading="lazy" src="{address("comparisons", comparison.id, "inputs", i)}" alt="your picture {i + 1}">'
        for i in range(int(spec.get("pictures") or 0))
    )
    return (
        f'<div class="lab headline"><h2>{e(title)}</h2>{pill(comparison.state)}<span class="acts">{acts}</span>'
        f"<p>{e(' · '.join(facts))}</p><div class='mine' data-zooms>{mine}</div></div>"
    )


def now(run: Run) -> str:
    """What a run is doing, in words."""
    if run.state == "queued":
        return f"number {run.position} in the queue" if run.position else "in the queue"
    if run.state == "running":
        fits = run.preflight()
        return (
            "stopping" if run.cancelling else " · ".join(dict.fromkeys(filter(None, (run.phase or "starting", fits))))
        )
    if run.state == "done":
        return f"finished in {duration(run.seconds)}"
    if run.state == "cancelled":
        return f"stopped at step {run.step:,}" if run.step else "stopped before it began"
    return run.message


def progress(run: Run) -> str:
    share = 100.0 if run.state == "done" else 100 * run.step / run.steps if run.steps else 0
    return (
        f'<div class="progress" style="--c:{colour(run.method)};--w:{share:.1f}%" role="progressbar" '
        f'aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100" aria-label="{e(name(run.method))}"></div>'
    )


def fact(label: str, value: str) -> str:
    """A number's cell; on narrow pages its label stands before it, and an empty one is left out."""
    return f'<td class="r num" data-label="{label}"{" data-empty" if value == "–" else ""}>{value}</td>'


def acts(run: Run) -> str:
    if run.state in ("queued", "running"):
        return f'<button class="act" data-do="cancel" data-id="{e(run.id)}">Cancel</button>'
    if run.state in ("failed", "cancelled"):
        return f'<button class="act" data-do="retry" data-id="{e(run.id)}">Retry</button>'
    return ""


def queue(comparison: Comparison) -> str:
    """One row a run: state, step of steps, steps per second, time left."""
    rows = []
    for run in comparison.runs:
        going = run.state == "running"
        rate = f"{run.rate:.2f}" if run.rate and going else "–"
        left = duration(run.eta_s) if run.eta_s is not None and going else "–"
        steps = f"{run.step:,} / {run.steps:,}" if run.steps and run.method != "base" else "–"
        seed = f"<small>seed {run.seed}</small>" if run.method != "base" else "<small>untrained</small>"
        rows.append(
            f'<tr data-run="{e(run.id)}" data-state="{e(run.state)}"><td class="name">{dot(run.method)}{e(name(run.method))}{seed}</td><td>{pill(run.state)}</td>'
            f'<td class="bar">{progress(run)}<small>{e(now(run)[:160])}</small></td>{fact("step", steps)}'
            f'{fact("steps/s", rate)}{fact("left", left)}<td><div class="acts">{acts(run)}</div></td></tr>'
        )
    return (
        '<div class="lab scroll"><table class="data queue"><thead><tr><th style="width:17%">Run</th><th style="width:12%">State</th><th style="width:31%">Progress</th>'
        '<th class="r">Step</th><th class="r">Steps/s</th><th class="r">Time left</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def failures(comparison: Comparison, logs: dict[str, str]) -> str:
    """One sentence for every cause of failed runs, with a log's last lines folded away: a base that cannot be had fails
    all of them alike."""
    causes: dict[str, list[Run]] = {}
    for run in comparison.runs:
        if run.state == "failed":
            causes.setdefault(run.message or "the training process ended without a word.", []).append(run)
    notes = [
        error(
            f"{'; '.join(f'{name(run.method)}, seed {run.seed}' for run in runs)}, failed: {cause}",
            f'<details><summary>The log\'s last lines</summary><pre class="log">{e(logs.get(runs[0].id) or "The log is empty.")}</pre></details>',
        )
        for cause, runs in causes.items()
    ]
    return f'<div class="lab" style="display:grid;gap:10px">{"".join(notes)}</div>' if notes else ""


def previews(comparison: Comparison) -> str:
    """The latest picture of every training run, made while it trains."""
    cards = []
    for run in comparison.runs:
        if run.method == "base":
            continue
        v = version(run.folder / "preview.png")
        title = f"{name(run.method)}, seed {run.seed}"
        shown = (
            f'<img data-zoom tabindex="0" src="{address("runs", run.id, "preview", v=v)}" alt="{e(title)}: preview">'
            if v
            else f'<div class="hold">{"no picture" if run.over else "first preview<br>comes soon"}</div>'
        )
        step = f"step {run.step:,}" if run.step else ""
        cards.append(
            f'<figure class="preview" style="--c:{colour(run.method)}">{shown}'
            f"<figcaption>{e(title)}<small class=num>{step}</small></figcaption></figure>"
        )
    return f'<div class="lab previews" data-zooms>{"".join(cards)}</div>'


# -- results -------------------------------------------------------------------------------------------
def prompt_text(comparison: Comparison, index: int) -> str:
    return comparison.spec["prompts"][index].replace("{subject}", comparison.spec["class_word"])


def cell(comparison: Comparison, method: str, prompt: int, seed: int, picture_seed: int) -> tuple[str, str]:
    """Address (empty while there is no picture) and description of one picture."""
    run = run_of(comparison, method, seed)
    told = f"{name(method)}: {prompt_text(comparison, prompt)}, picture seed {picture_seed}"
    v = version(run.folder / "samples" / f"p{prompt}_s{picture_seed}.png") if run else 0
    return (address("runs", run.id, "samples", prompt, picture_seed, v=v) if run and v else ""), told


def grid(comparison: Comparison, seed: int, picture_seed: int) -> str:
    """Rows are prompts; columns the base and the methods; the same seeds everywhere."""
    columns = methods(comparison)
    top = "".join(
        f'<div class="col" style="--c:{colour(m)}">{e(name(m))}<small>{"untrained" if m == "base" else f"training seed {seed}"}</small></div>'
        for m in columns
    )
    rows = []
    for index in range(len(comparison.spec["prompts"])):
        cells = []
        for method in columns:
            src, told = cell(comparison, method, index, seed, picture_seed)
            run = run_of(comparison, method, seed)
            wait = run.state if run and run.over and run.state != "done" else "not yet"
            cells.append(
                f'<img data-zoom tabindex="0" loading="lazy" src="{src}" alt="{e(told)}">'
                if src
                else f'<div class="none">{wait}</div>'
            )
        rows.append(
            f'<div data-row><div class="prompt">{e(prompt_text(comparison, index))}</div>{"".join(cells)}</div>'
        )
    return (
        f'<div class="lab scroll"><div class="grid" data-zooms style="--n:{len(columns)}">'
        f"<div></div>{top}{''.join(rows)}</div></div>"
    )


def over(comparison: Comparison, left: str, right: str, prompt: int, seed: int, picture_seed: int) -> str:
    """Two columns laid over each other, with a line to drag."""
    a, told_a = cell(comparison, left, prompt, seed, picture_seed)
    b, told_b = cell(comparison, right, prompt, seed, picture_seed)
    if not a or not b:
        return '<div class="lab empty"><p>These two pictures are not made yet.</p></div>'
    return (
        f'<div class="lab"><div class="over"><img src="{b}" alt="{e(told_b)}"><img class="left" src="{a}" alt="{e(told_a)}">'
        f'<span class="a">{e(name(left))}</span><span class="b">{e(name(right))}</span>'
        '<input type="range" data-cut min="0" max="100" value="50" aria-label="where the two pictures meet"></div></div>'
    )


def score(row: dict[str, Any], key: str) -> str:
    value, spread = row.get(key), row.get(f"{key}_spread")
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def results(rows: Sequence[dict[str, Any]]) -> str:
    """The table under the grid: one row a method, means over training seeds, ± their standard deviation."""
    body = []
    for row in rows:
        trained = row["method"] != "base"
        seeds = f"<small>{row['runs']} seed{'s' * (row['runs'] != 1)}</small>" if trained and row.get("runs") else ""
        params = row.get("trainable_parameters")
        body.append(
            f'<tr><td class="name">{dot(row["method"])}{e(name(row["method"]))}{seeds}</td>'
            f'<td class="r num">{f"{params:,.0f}" if params else "–"}</td>'
            f'<td class="r num">{size(row.get("adapter_bytes"))}</td>'
            f'<td class="r num">{duration(row.get("train_seconds"))}</td>'
            f'<td class="r num">{size(row.get("peak_memory_bytes"))}</td>'
            f'<td class="r num">{score(row, "clip_t")}</td><td class="r num">{score(row, "clip_i")}</td></tr>'
        )
    return (
        '<div class="lab scroll"><table class="data results"><thead><tr><th>Method</th><th class="r">Trainable parameters</th>'
        '<th class="r">Adapter file</th><th class="r">Training</th><th class="r">Peak memory</th>'
        '<th class="r" title="cosine of picture and prompt">CLIP-T</th><th class="r" title="cosine of picture and your pictures">CLIP-I</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """What the numbers bear out, in the words of `lab.compare`: differences inside the spread are called that."""
    from lab import compare

    told = "<br>".join(e(sentence) for sentence in compare.verdicts(rows))
    return f'<div class="lab notice">{told}</div>' if told else ""


def downloads(comparison: Comparison) -> str:
    """Links to the files, each checked again by its route."""
    links = [
        f'<a href="{address("runs", run.id, "adapter")}" download>{dot(run.method)}{e(name(run.method))} <small>seed {run.seed} · adapter.zip</small></a>'
        for run in comparison.runs
        if run.method in METHODS and run.state == "done"  # not the base, nor what the visitor brought
    ]
    if any(run.state == "done" for run in comparison.runs):
        links += [
            f'<a href="{address("comparisons", comparison.id, "grid")}" download>Grid <small>PNG</small></a>',
            f'<a href="{address("comparisons", comparison.id, "table")}" download>Table <small>CSV</small></a>',
            f'<a href="{address("comparisons", comparison.id, "report")}" target="_blank" rel="noopener">Report <small>HTML</small></a>',
        ]
    return f'<div class="lab downloads">{"".join(links)}</div>' if links else ""
