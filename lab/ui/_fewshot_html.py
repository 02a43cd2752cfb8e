"""The few-shot tab's HTML. Class names come from strangers: everything goes through `e`."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any

from lab import datasets
from lab.clip import protocol, table
from lab.runs import Run
from lab.ui.html import dot, duration, e, pill, size

SHOWN_CLASSES, THUMBS, SIDE = 60, 4, 48
Record = dict[str, Any]


@functools.lru_cache(maxsize=2048)
def picture(dataset: str, key: str, side: int = SIDE) -> str:
    """A dataset's picture as a small data URI: the page needs no address for it that others could try."""
    image = _listing(dataset).open(key)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.lru_cache(maxsize=8)
def _listing(dataset: str) -> datasets.Listing:
    return datasets.resolve(dataset, local=False).listing()


def classes(dataset: str) -> str:
    """What is in a dataset: totals, notes, and for each class some pictures and how many there are."""
    row, listing = datasets.resolve(dataset, local=False), _listing(dataset)
    counts = listing.counts()
    labels, held = ([p.label for p in part] for part in (listing.train, listing.validation))
    most = protocol.most_shots(labels, held, len(listing.classes))
    facts = [
        f"{len(listing.classes):,} classes",
        f"{len(listing.train) + len(listing.validation):,} pictures to train and validate on",
        f"{len(listing.test):,} to test on",
        f"up to {most} shots",
        f"licence: {row.licence}",
    ]
    shown: dict[int, list[str]] = {i: [] for i in range(min(SHOWN_CLASSES, len(counts)))}
    for p in listing.train:
        if p.label in shown and len(shown[p.label]) < THUMBS:
            shown[p.label].append(p.key)
    cards = "".join(
        '<div class="fs-class"><div class="fs-thumbs">'
        + "".join(f'<img src="{picture(dataset, key)}" alt="" loading="lazy">' for key in keys)
        + f"</div><b>{e(listing.classes[i])}</b><small>{counts[i][0]} to train, {counts[i][1]} to test</small></div>"
        for i, keys in shown.items()
    )
    more = len(counts) - len(shown)
    rest = f'<p class="fs-more">and {more:,} more classes</p>' if more > 0 else ""
    notes = "".join(f'<p class="fs-note">{e(note)}</p>' for note in listing.notes)
    return f'<div class="lab fs"><p class="fs-facts">{e(" · ".join(facts))}</p>{notes}<div class="fs-classes">{cards}</div>{rest}</div>'


def queue(runs: Sequence[Run]) -> str:
    """Every run of a comparison with what it is doing."""
    rows = "".join(_run(run) for run in runs)
    done = sum(run.over for run in runs)
    return (
        f'<div class="lab fs"><details class="fold" open><summary>{done} of {len(runs)} runs over</summary>'
        f'<div class="fs-scroll fs-queue"><table>{rows}</table></div></details></div>'
    )


def _run(run: Run) -> str:
    from lab.tasks.fewshot import name

    share = run.step / run.steps if run.steps else 0.0
    share = 1.0 if run.state == "done" else share
    what = run.message or run.phase or (f"place {run.position} in the queue" if run.position else "")
    verb = {"queued": "cancel", "running": "cancel", "failed": "retry", "cancelled": "retry"}.get(run.state)
    act = f'<button class="act" data-do="{verb}" data-id="{e(run.id)}">{verb.title()}</button>' if verb else ""
    eta = duration(run.eta_s) if run.eta_s is not None and run.state == "running" else ""
    return (
        f"<tr><td>{dot(run.method)} {e(name(run.method))}</td><td>seed {run.seed}</td><td>{pill(run.state)}</td>"
        f'<td><span class="fs-bar"><i style="width:{100 * share:.0f}%"></i></span></td>'
        f'<td class="fs-what">{e(what)}</td><td>{e(eta)}</td><td>{act}</td></tr>'
    )


def results(found: Sequence[Record]) -> str:
    """The table in the shape of NoRA's Table 2, with what each method cost."""
    if not found:
        return '<div class="lab fs"><p class="fs-note">The table begins when the first run has finished.</p></div>'
    heads = table.columns(found)
    names = {d: datasets.resolve(d, local=False).name if d != table.AVERAGE else "Average" for d, _ in heads}
    top = "".join(f"<th>{e(names[d])}<br>{k} shots</th>" for d, k in heads)
    body = "".join(_row(row, heads) for row in table.rows(found))
    return (
        '<div class="lab fs"><div class="fs-scroll"><table class="fs-table"><thead><tr><th>Method</th>'
        f"{top}<th>Parameters</th><th>Training</th><th>Memory</th></tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="fs-note">Top-1 accuracy in per cent, mean ± standard deviation over seeds. '
        "<b>Bold</b>: best, <u>underlined</u>: second, each only where its lead is larger than the noise. Parameters: all that "
        "is trained with the most shots, a linear head included. Training: mean seconds of one number of shots, without "
        "validation. Memory: the largest peak of the process.</p></div>"
    )


def _row(row: Record, heads: Sequence[tuple[str, int]]) -> str:
    cells = "".join(f"<td>{table.cell(row['cells'].get(key), '<b>', '</b>', '<u>', '</u>')}</td>" for key in heads)
    return (
        f"<tr><td>{dot(row['method'])} {e(row['name'])}</td>{cells}<td>{row['trainable_parameters']:,}</td>"
        f"<td>{duration(row['train_seconds'])}</td><td>{size(row['peak_memory_bytes'])}</td></tr>"
    )


def per_class(record: Record, names: Sequence[str]) -> str:
    """Accuracy of each class, worst first."""
    known = [
        (a, n, c)
        for a, n, c in zip(record["per_class"], names, record["per_class_count"], strict=True)
        if a is not None
    ]
    rows = "".join(
        f'<div class="fs-acc"><span>{e(name)}</span><span class="fs-bar"><i style="width:{100 * accuracy:.0f}%"></i></span>'
        f"<span>{accuracy:.0%} of {count}</span></div>"
        for accuracy, name, count in sorted(known)[:100]
    )
    more = f'<p class="fs-more">and {len(known) - 100:,} more classes</p>' if len(known) > 100 else ""
    return f'<div class="lab fs">{rows}{more}</div>'


def wrong(record: Record, names: Sequence[str]) -> str:
    """The test pictures that were most confidently wrong."""
    cards = "".join(
        f'<figure><img src="{picture(record["dataset"], w["picture"], 96)}" alt=""><figcaption>'
        f"<b>{e(names[w['predicted']])}</b> {w['confidence']:.0%}<br><small>is {e(names[w['truth']])} "
        f"({w['truth_probability']:.0%})</small></figcaption></figure>"
        for w in record["wrong"]
    )
    return f'<div class="lab fs"><div class="fs-wrong">{cards or "<p>No test picture was wrong.</p>"}</div></div>'


def answers(given: Sequence[Record]) -> str:
    """The five likeliest classes of one picture by each method, side by side."""
    from lab.tasks.fewshot import name

    cards = "".join(
        f'<div class="fs-card"><h4>{dot(a["method"])} {e(name(a["method"]))}</h4>{_top(a)}</div>' for a in given
    )
    return f'<div class="lab fs"><div class="fs-cards">{cards}</div></div>'


def _top(answer: Record) -> str:
    if "error" in answer:
        return f"<p>{e(answer['error'])}</p>"
    return "".join(
        f'<div class="fs-acc"><span>{e(name)}</span><span class="fs-bar"><i style="width:{100 * p:.0f}%"></i></span>'
        f"<span>{p:.0%}</span></div>"
        for name, p in answer["top"]
    )


def _of(spec: Record) -> str:
    """The comparison's datasets, and the template where it is the visitor's to change."""
    ids = [spec["dataset"], *(spec.get("also") or [])]
    names = ", ".join(datasets.resolve(id, local=False).name for id in ids)
    templates = f"template “{spec['template']}”" if len(ids) == 1 else "each with its own template"
    return e(f"{names}, {templates},")


def written(spec: Record | None) -> str:
    """The protocol in words, with this comparison's own settings."""
    own = ""
    if spec:
        from lab.tasks.fewshot import PRESETS

        preset = PRESETS[spec["preset"]]
        own = (
            f"<p>This comparison: {e(spec['base'])}, {_of(spec)} adapters on {e(spec['targets'])} of "
            f"{'both encoders' if spec['encoder'] == 'both' else 'the ' + e(spec['encoder']) + ' encoder'}, seeds "
            f"{e(', '.join(map(str, spec['seeds'])))}, preset {e(preset.name)}: {e(preset.summary)}</p>"
        )
    return f'<div class="lab fs"><details class="fold" open><summary>Protocol</summary><p>{e(protocol.WRITTEN)}</p>{own}</details></div>'
