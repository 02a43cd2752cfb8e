"""Few-shot results in the shape of NoRA's Table 2: methods × datasets × shots, mean ± deviation over seeds. No torch.

A best value is bold, a second one underlined, only where its lead is larger than the noise: Welch's t-test over the
seeds' accuracies says at 5 % (one-sided) that it is above the next. One seed proves nothing and marks nothing.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lab.tasks import fewshot

LEVEL = 0.05
AVERAGE = ""  # stands for the mean over datasets where a dataset's id may stand
COLUMNS = (
    "method", "dataset", "shots", "seed", "accuracy", "validation_accuracy", "trainable_parameters", "adapter_bytes",
    "train_seconds", "peak_memory_bytes", "lr", "best_step", "steps",
)  # fmt: skip

Record = dict[str, Any]


def records(runs: Iterable[dict[str, Any]]) -> list[Record]:
    """Finished runs (dicts with `result`, as the queue and the command line have them) → one record a dataset and number
    of shots."""
    found = []
    for run in runs:
        result = run.get("result") or {}
        for part in result.get("shots", []):
            same = {"method": result["method"], "seed": result["seed"]}
            same["dataset"] = part.get("dataset", result["dataset"])
            found.append(part | same | {"name": fewshot.name(result["method"]), "folder": str(run.get("folder", ""))})
    return found


def rows(found: Sequence[Record]) -> list[Record]:
    """One row a method: `cells` by (dataset, shots) with mean, spread (sample deviation, None for one seed), seeds and
    mark ("best", "second", ""), and means of parameters, seconds and memory over its runs."""
    ids = list(dict.fromkeys(record["method"] for record in found))
    heads = columns(found)
    made = [_row(id, [r for r in found if r["method"] == id], heads) for id in ids]
    for key in heads:
        _mark([row["cells"][key] for row in made if key in row["cells"]])
    return made


def columns(found: Sequence[Record]) -> list[tuple[str, int]]:
    """(dataset, shots), shots rising, datasets in the order they came, and their average where there are several."""
    made: list[tuple[str, int]] = []
    for shots in sorted({record["shots"] for record in found}):
        names = list(dict.fromkeys(record["dataset"] for record in found if record["shots"] == shots))
        made += [(name, shots) for name in names] + ([(AVERAGE, shots)] if len(names) > 1 else [])
    return made


def _row(id: str, own: list[Record], heads: Sequence[tuple[str, int]]) -> Record:
    cells = {}
    for key in heads:
        values = _average(own, heads, key[1]) if key[0] == AVERAGE else _values(own, key)
        if not values:
            continue
        spread = statistics.stdev(values) if len(values) > 1 else None
        cells[key] = {"mean": statistics.fmean(values), "spread": spread, "values": values, "mark": ""}
    most = max(own, key=lambda r: r["shots"])  # of the first dataset
    return {
        "method": id,
        "name": own[0]["name"],
        "cells": cells,
        "trainable_parameters": most["trainable_parameters"],
        "train_seconds": statistics.fmean(r["train_seconds"] for r in own),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in own),
    }


def _values(own: list[Record], key: tuple[str, int]) -> list[float]:
    return [r["accuracy"] for r in own if (r["dataset"], r["shots"]) == key]


def _average(own: list[Record], heads: Sequence[tuple[str, int]], shots: int) -> list[float]:
    """Each seed's mean over the datasets; seeds that lack one of them are left out."""
    names = [name for name, k in heads if k == shots and name != AVERAGE]
    seeds: dict[int, dict[str, float]] = {}
    for r in own:
        if r["shots"] == shots:
            seeds.setdefault(r["seed"], {})[r["dataset"]] = r["accuracy"]
    return [statistics.fmean(by.values()) for by in seeds.values() if len(by) == len(names)]


def _mark(cells: list[Record]) -> None:
    ranked = sorted(cells, key=lambda cell: -cell["mean"])
    for place, mark in ((0, "best"), (1, "second")):
        if len(ranked) > place + 1 and above(ranked[place]["values"], ranked[place + 1]["values"]):
            ranked[place]["mark"] = mark


def above(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first mean lies above the second beyond the noise (Welch's t-test, one-sided, 5 %).

    Values without any spread, such as zero-shot accuracy, count as known exactly.
    """
    if len(first) < 2 or len(second) < 2:
        return False
    gap = statistics.fmean(first) - statistics.fmean(second)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if gap <= 0 or sum(parts) == 0:
        return gap > 0
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True))
    return t_tail(gap / math.sqrt(sum(parts)), freedom) < LEVEL


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t distribution, t ≥ 0, by Simpson's rule over the angle θ = arctan(t/√ν): the density
    becomes proportional to cos^{ν−1} θ, smooth and bounded. Beyond ν = 1000 the normal distribution is as near."""
    freedom = min(freedom, 1000.0)
    end, start, n = math.pi / 2, math.atan(t / math.sqrt(freedom)), 400
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    step = (end - start) / n
    total = 0.0
    for i in range(n + 1):
        weight = 1 if i in (0, n) else 4 if i % 2 else 2
        total += weight * max(math.cos(start + i * step), 0.0) ** max(freedom - 1, 0.0)
    return min(0.5, math.exp(log_scale) * total * step / 3)


# -- as text -----------------------------------------------------------------------------------------------
def markdown(found: Sequence[Record]) -> str:
    """The table as Markdown: per cent, ± one deviation over seeds."""
    heads = columns(found)
    lines = [
        "| Method | Parameters | " + " | ".join(f"{name or 'average'}, {k} shots" for name, k in heads) + " |",
        "|" + "---|" * (2 + len(heads)),
    ]
    for row in rows(found):
        cells = [cell(row["cells"].get(key), "**", "**", "<u>", "</u>") for key in heads]
        lines.append(f"| {row['name']} | {row['trainable_parameters']:,} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def cell(made: Record | None, best: str, best_end: str, second: str, second_end: str) -> str:
    """One cell: "81.8 ± 0.4", wrapped in the given marks where it earned one."""
    if made is None:
        return "–"
    spread = f" ± {100 * made['spread']:.1f}" if made["spread"] is not None else ""
    text = f"{100 * made['mean']:.1f}{spread}"
    before, after = {"best": (best, best_end), "second": (second, second_end)}.get(made["mark"], ("", ""))
    return f"{before}{text}{after}"


def results_csv(found: Sequence[Record]) -> str:
    """One line a method, seed and number of shots."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()
