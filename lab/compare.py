"""A comparison's results as people take them away: a table, a grid of pictures, a CSV, a report. Imports no torch.

`runs` are plain dicts with method, seed, state, folder and result (`lab.comparison`, `lab.runs.Run.as_dict`).
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lab import images
from lab.files import write_atomic
from lab.methods import METHODS
from lab.tasks.subject import prompts

Run = dict[str, Any]
SCORES = ("clip_t", "clip_i")
COSTS = ("trainable_parameters", "adapter_bytes", "train_seconds", "sample_seconds", "peak_memory_bytes")


def name(method: str) -> str:
    """How people call a method; "Base model" for the untouched one."""
    return "Base model" if method == "base" else METHODS[method].name if method in METHODS else method


def finished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run["state"] == "done" and run["result"]]


def methods(runs: Sequence[Run]) -> list[str]:
    """The methods in the order of their runs, the base first."""
    found = list(dict.fromkeys(run["method"] for run in runs))
    return sorted(found, key=lambda method: method != "base")


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there is no value, or only one to spread."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a method with finished runs: means over its training seeds.

    clip_t, clip_i, drift: mean over prompts, sample seeds and training seeds; "<score>_spread": standard deviation of
    the runs' means over training seeds, None for one seed and for the base, which is not trained. gain, gain_spread:
    clip_i less the base's. size_ratio: trainable parameters over those of LoRA, where LoRA is in the comparison.
    """
    done = finished(runs)
    rows = [_row(method, [run for run in done if run["method"] == method]) for method in methods(done)]
    by_method = {row["method"]: row for row in rows}
    for row in rows:
        base, lora = by_method.get("base"), by_method.get("lora")
        if base and row is not base and row["clip_i"] is not None and base["clip_i"] is not None:
            row["gain"] = row["clip_i"] - base["clip_i"]
        if lora and row["trainable_parameters"] and lora["trainable_parameters"]:
            row["size_ratio"] = row["trainable_parameters"] / lora["trainable_parameters"]
    return rows


def _row(method: str, runs: list[Run]) -> dict[str, Any]:
    results = [run["result"] for run in runs]
    row: dict[str, Any] = {
        "method": method,
        "name": name(method),
        "runs": len(runs),
        "seeds": [run["seed"] for run in runs],
        "knobs": results[0].get("knobs", {}),
        "lr": results[0].get("lr"),
        "gain": None,
        "size_ratio": None,
    }
    for key in COSTS:
        value, _ = mean_and_spread([r[key] for r in results if r.get(key) is not None])
        whole = value is not None and not key.endswith("seconds")
        row[key] = round(value) if whole and value is not None else value
    for key in (*SCORES, "drift"):
        row[key], row[f"{key}_spread"] = mean_and_spread([r[key] for r in results if r.get(key) is not None])
    return row


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on CLIP-I that the numbers bear out, and none that they do not: no winner inside the spread."""
    said = []
    for row in rows:
        if row["gain"] is None:
            continue
        spread = row["clip_i_spread"]
        if spread is None:
            tail = "; one training seed tells nothing of the spread."
        elif row["gain"] > spread:
            tail = f", more than the spread over seeds ({spread:.3f})."
        else:
            tail = f", within the spread over seeds ({spread:.3f}): no gain shown."
        said.append(f"{row['name']}: CLIP-I {row['gain']:+.3f} over the base model{tail}")
    trained = sorted((r for r in rows if r["gain"] is not None), key=lambda r: -r["clip_i"])
    if len(trained) > 1:
        first, second = trained[:2]
        gap = first["clip_i"] - second["clip_i"]
        noise = sum((r["clip_i_spread"] or 0) ** 2 for r in (first, second)) ** 0.5
        if first["clip_i_spread"] is None or second["clip_i_spread"] is None:
            said.append(
                f"{first['name']} and {second['name']} differ by {gap:.3f}; train with two seeds or more to judge."
            )
        elif gap <= noise:
            said.append(
                f"{first['name']} and {second['name']} differ by {gap:.3f}, inside the spread ({noise:.3f}): no winner."
            )
        else:
            said.append(f"{first['name']} is {gap:.3f} above {second['name']}, beyond the spread ({noise:.3f}).")
    small = [r for r in trained if r["size_ratio"] and r["size_ratio"] < 1 and r["lr"] is not None]  # not those brought
    said += [f"{r['name']} trains {r['size_ratio']:.0%} of LoRA's parameters." for r in small]
    return said


# -- the grid ------------------------------------------------------------------------------------------
def sample_path(folder: str | Path, prompt: int, sample_seed: int) -> Path:
    return Path(folder) / "samples" / f"p{prompt}_s{sample_seed}.png"


def grid(
    folder: Path | str, spec: dict[str, Any], runs: Sequence[Run], *, seed: int | None = None, side: int = 0
) -> Image.Image:
    """Rows: prompts. Columns: the base, then each method. Above them, the subject's own pictures.

    Each cell shows the sample seeds side by side, of the run with training seed `seed` (default: each method's first
    finished one). `side` is that of a picture, in pixels (default: 192 for small pictures, 384 for large ones).
    """
    done = finished(runs)
    chosen = [
        next((r for r in done if r["method"] == m and r["seed"] in (seed, 0 if m == "base" else seed)), None)
        or next(r for r in done if r["method"] == m)
        for m in methods(done)
    ]
    rows = prompts(spec, "base")
    cells = [
        [[_open(sample_path(run["folder"], p, s)) for s in spec["sample_seeds"]] for run in chosen]
        for p in range(len(rows))
    ]
    side = side or (192 if cells[0][0][0].width <= 256 else 384)
    by_method = {row["method"]: row for row in table(runs)}
    sheet = images.grid(
        cells,
        rows,
        [name(run["method"]) for run in chosen],
        notes=[_note(by_method[run["method"]]) for run in chosen],
        side=side,
    )
    pictures = [images.enlarged(p, 96) for p in _inputs(Path(folder), spec)]
    return _with_subject(sheet, pictures, f"Subject: {spec['class_word']}, {len(pictures)} pictures")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _inputs(folder: Path, spec: dict[str, Any]) -> list[Image.Image]:
    pictures = images.read_folder(folder / "inputs")
    crops = spec.get("crops") or [None] * len(pictures)
    return [images.cropped(p, crop, 96, i) for i, (p, crop) in enumerate(zip(pictures, crops, strict=True))]


def _note(row: dict[str, Any]) -> str:
    clip = f"CLIP-I {row['clip_i']:.2f}" if row["clip_i"] is not None else ""
    return f"{row['trainable_parameters']:,} parameters · {clip}" if row["trainable_parameters"] else clip


def _with_subject(sheet: Image.Image, pictures: list[Image.Image], title: str) -> Image.Image:
    """The subject's own pictures above the grid."""
    from PIL import ImageDraw

    gap, head = 8, 34
    strip = images.strip(pictures, 96) if pictures else Image.new("RGB", (1, 1), images.PAPER)
    whole = Image.new(
        "RGB", (max(sheet.width, strip.width + 2 * gap), head + strip.height + gap + sheet.height), images.PAPER
    )
    ImageDraw.Draw(whole).text((gap, gap), title, images.INK, images.font(20))
    whole.paste(strip, (gap, head))
    whole.paste(sheet, (0, head + strip.height + gap))
    return whole


# -- files ---------------------------------------------------------------------------------------------
COLUMNS = (
    *("scope", "method", "name", "runs", "seeds", "knobs", "lr", *COSTS, "size_ratio"),
    *("clip_t", "clip_t_spread", "clip_i", "clip_i_spread", "gain", "drift", "drift_spread"),
)


def results_csv(runs: Sequence[Run]) -> str:
    """The table as CSV: a row a method (scope "method"), then a row a run (scope "run")."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in table(runs):
        row |= {"scope": "method"}
        writer.writerow({key: _cell(row[key]) for key in COLUMNS})
    for run in finished(runs):
        row = _row(run["method"], [run]) | {"scope": "run", "name": f"{name(run['method'])}, seed {run['seed']}"}
        writer.writerow({key: _cell(row[key]) for key in COLUMNS})
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return round(value, 6) if isinstance(value, float) else value


def write_report(folder: Path | str, spec: dict[str, Any], runs: Sequence[Run]) -> list[Path]:
    """Write grid.png, results.csv and report.html into the comparison's folder; what was written.

    Each is whole or not there. Nothing is written while no run is finished.
    """
    from lab.report import html

    folder = Path(folder)
    if not finished(runs):
        return []
    sheet = grid(folder, spec, runs)
    write_atomic(folder / "grid.png", lambda path: sheet.save(path, format="PNG"))
    write_atomic(folder / "results.csv", results_csv(runs))
    write_atomic(folder / "report.html", html(folder, spec, runs))
    return [folder / "grid.png", folder / "results.csv", folder / "report.html"]
