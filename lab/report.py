"""A comparison as one HTML file: pictures, table, loss curves, settings; nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import html as escaping
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lab import compare, images
from lab.plots import colour
from lab.tasks.subject import prompts

Run = dict[str, Any]
STYLE = (Path(__file__).parent / "report.css").read_text()


def e(value: Any) -> str:
    return escaping.escape(str(value))


def html(folder: Path, spec: dict[str, Any], runs: Sequence[Run]) -> str:
    """The whole page. `folder` holds the comparison's inputs."""
    done = compare.finished(runs)
    rows = compare.table(runs)
    title = f"{spec['class_word']}: {', '.join(row['name'] for row in rows if row['method'] != 'base')}"
    verdicts = "".join(f"<li>{e(sentence)}</li>" for sentence in compare.verdicts(rows))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{e(title)} · NoRA Lab</title><style>{STYLE}</style></head><body><main>
<header><p class="lab">NoRA Lab</p><h1>{e(title)}</h1>
<p class="facts">{e(_facts(spec, rows))}</p></header>
<section><h2>The subject</h2><div class="strip">{_subject(folder, spec)}</div></section>
<section><h2>Side by side</h2>
<p class="hint">Same prompts, same first noise in every column. Each cell holds {len(spec["sample_seeds"])} sample
seed{"s" * (len(spec["sample_seeds"]) > 1)}; more training seeds follow below each other.</p>{_grid(spec, done)}</section>
<section><h2>Numbers</h2>{_table(rows)}<ul class="verdicts">{verdicts}</ul>
<p class="hint">CLIP-T: cosine of picture and prompt. CLIP-I: mean cosine of picture and the subject's pictures. Drift:
how far pictures of unrelated prompts moved from the base's, 0 to 1. ±: standard deviation over training seeds.
Memory: what the training process held at its peak.</p></section>
<section><h2>Loss</h2>{_losses(done)}</section>
<section><h2>Settings</h2>{_settings(spec, done)}</section>
</main></body></html>
"""


def _facts(spec: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    seeds = max((row["runs"] for row in rows if row["method"] != "base"), default=0)
    return (
        f"{spec['base']} · {spec['steps']:,} steps of {spec['batch']} · {seeds} training seed{'s' * (seeds != 1)} · "
        f"{len(spec['prompts'])} prompts × {len(spec['sample_seeds'])} sample seeds"
    )


def _img(picture: Image.Image, alt: str) -> str:
    """An inline picture; small ones keep their own pixels and are enlarged by the browser, sharply."""
    side = 128 if max(picture.size) <= 256 else 240
    shown = picture if max(picture.size) <= 512 else images.enlarged(picture, 512)
    out = io.BytesIO()
    shown.save(out, format="PNG", optimize=True)
    sharp = ' class="sharp"' if max(shown.size) * 1.5 < side else ""
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img{sharp} src="data:image/png;base64,{data}" alt="{e(alt)}" width="{side}" height="{side}">'


def _subject(folder: Path, spec: dict[str, Any]) -> str:
    pictures = images.read_folder(folder / "inputs")
    crops = spec.get("crops") or [None] * len(pictures)
    captions = spec.get("captions") or [""] * len(pictures)
    return "".join(
        f"<figure>{_img(images.cropped(p, crop, 128, i), caption or spec['class_word'])}"
        f"<figcaption>{e(caption)}</figcaption></figure>"
        for i, (p, crop, caption) in enumerate(zip(pictures, crops, captions, strict=True))
    )


def _grid(spec: dict[str, Any], done: Sequence[Run]) -> str:
    methods = compare.methods(done)
    head = "".join(f'<th><i style="background:{colour(m)}"></i>{e(compare.name(m))}</th>' for m in methods)
    body = []
    for p, prompt in enumerate(prompts(spec, "base")):
        cells = []
        for method in methods:
            strips = []
            for run in (r for r in done if r["method"] == method):
                pictures = [
                    _img(compare._open(compare.sample_path(run["folder"], p, s)), f"{method}, {prompt}, seed {s}")
                    for s in spec["sample_seeds"]
                ]
                strips.append(f'<div class="cell">{"".join(pictures)}</div>')
            cells.append(f"<td>{''.join(strips)}</td>")
        body.append(f"<tr><th scope=row>{e(prompt)}</th>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="grid"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("Method", "Settings", "Parameters", "of LoRA", "File", "Train", "Memory", "CLIP-T", "CLIP-I", "Drift")
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table class="numbers"><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{body}</table></div>'


def _cells(row: dict[str, Any]) -> list[str]:
    knobs = ", ".join(f"{k} {v}" for k, v in row["knobs"].items())
    return [
        f'<i style="background:{colour(row["method"])}"></i>{e(row["name"])}',
        f"<small>{e(knobs)}</small>",
        _shown(row["trainable_parameters"], "{:,}"),
        _shown(row["size_ratio"], "{:.0%}"),
        size(row["adapter_bytes"]),
        _shown(row["train_seconds"], "{:.0f} s"),
        size(row["peak_memory_bytes"]),
        *(_spread(row, key) for key in ("clip_t", "clip_i", "drift")),
    ]


def _shown(value: Any, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def _spread(row: dict[str, Any], key: str) -> str:
    spread = row[f"{key}_spread"]
    return _shown(row[key], "{:.3f}") + (f" <small>± {spread:.3f}</small>" if spread is not None else "")


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} B"


def _losses(done: Sequence[Run]) -> str:
    """Smoothed loss curves, a line a run, as SVG."""
    curves = [(run, _smooth(run)) for run in done if run["method"] != "base"]
    curves = [(run, curve) for run, curve in curves if len(curve) > 1]
    if not curves:
        return "<p>Nothing was trained.</p>"
    low, high = (f(v for _, curve in curves for v in curve) for f in (min, max))
    width, height, span = 900, 240, (high - low) or 1.0
    lines = []
    for run, curve in curves:
        points = " ".join(
            f"{50 + i / (len(curve) - 1) * (width - 60):.1f},{10 + (high - v) / span * (height - 40):.1f}"
            for i, v in enumerate(curve)
        )
        label = f"{compare.name(run['method'])}, seed {run['seed']}"
        lines.append(
            f'<polyline points="{points}" stroke="{colour(run["method"])}"><title>{e(label)}</title></polyline>'
        )
    steps = max(len(curve) for _, curve in curves)
    axis = (
        f'<text x="44" y="18" text-anchor="end">{high:.3g}</text><text x="44" y="{height - 28}" text-anchor="end">{low:.3g}</text>'
        f'<text x="50" y="{height - 8}">1</text><text x="{width - 10}" y="{height - 8}" text-anchor="end">{steps:,} steps</text>'
    )
    keys = "".join(
        f'<span><i style="background:{colour(m)}"></i>{e(compare.name(m))}</span>'
        for m in dict.fromkeys(run["method"] for run, _ in curves)
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss curves">{axis}{"".join(lines)}</svg><p class="keys">{keys}</p>'


def _smooth(run: Run) -> list[float]:
    """The run's loss, averaged exponentially: single steps vary with the noise level they drew."""
    path = Path(run["folder"]) / "metrics.jsonl"
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []
    smooth, value, weight = [], 0.0, 0.0
    for loss in losses:
        value, weight = 0.95 * value + 0.05 * loss, 0.95 * weight + 0.05
        smooth.append(value / weight)
    return smooth


def _settings(spec: dict[str, Any], done: Sequence[Run]) -> str:
    shown = {k: v for k, v in spec.items() if v is not None and k not in ("captions", "crops")}
    rows = "".join(
        f"<tr><th scope=row>{e(k)}</th><td>{e(json.dumps(v, ensure_ascii=False))}</td></tr>" for k, v in shown.items()
    )
    meta = Path(done[0]["folder"]) / "meta.json" if done else None
    made = ""
    if meta and meta.exists():
        told = json.loads(meta.read_text())
        versions = ", ".join(f"{k} {v}" for k, v in told.get("versions", {}).items())
        made = f'<p class="hint">{e(told.get("device", ""))} · {e(versions)}</p>'
    return f'<div class="scroll"><table class="settings">{rows}</table></div>{made}'
