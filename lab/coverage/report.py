"""Everything the Coverage tab shows, from its state: plain data in, plain data out. Imports no torch and no Gradio."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lab import budget
from lab.coverage import apart, curves
from lab.coverage.closed import FORMS
from lab.coverage.curves import Record
from lab.errors import LabError
from lab.methods import METHODS
from lab.registry import unknown

WHAT = {
    "coverage": "Span (Figure 2)",
    "local": "Degrees of freedom",
    "rank": "Rank of one update",
    "error-full": "Fit, full-rank target",
    "error-low": "Fit, low-rank target",
    "error-real": "Fit, real fine-tuning",
}
KEYS = {"coverage": ("coverage", "closed_form"), "local": ("local_dimension", "local_closed_form"),
        "rank": ("update_rank", "update_rank_closed_form"), "error": ("error", "")}  # fmt: skip
DEFAULT_METHODS = ("nola", "pranc", "nora", "lora", "lora-xs", "vera")
MAX_METHODS = 12
PAINT_S = 0.5  # a figure is sent no more often while points come in


@dataclass(frozen=True)
class View:
    """What the tab is asked to show."""

    d: int = 16
    methods: tuple[str, ...] = DEFAULT_METHODS
    share: float = 1.0  # the largest parameter count, over d²
    counts: tuple[int, ...] = ()  # typed ones; none: automatic up to `share`
    what: str = "coverage"
    start: bool = False
    log: bool = False
    seed: int = 0

    def wanted(self) -> list[int]:
        return list(self.counts) or curves.automatic(self.d, self.share)

    @property
    def large(self) -> bool:
        return self.d > curves.LARGE_D

    @property
    def kind(self) -> str:
        return self.what.partition("-")[0]

    @property
    def target(self) -> str:
        return self.what.partition("-")[2]

    def link(self) -> dict[str, str]:
        """What the address bar holds: what differs from the default."""
        values = {
            "d": str(self.d), "m": ",".join(self.methods), "n": ",".join(map(str, self.counts)),
            "upto": f"{self.share:g}", "show": self.what, "a0": str(int(self.start)), "log": str(int(self.log)),
            "seed": str(self.seed),
        }  # fmt: skip
        plain = {"d": "", "m": ",".join(DEFAULT_METHODS), "n": "", "upto": "1", "show": "coverage"}
        return {k: v for k, v in values.items() if v != plain.get(k, "0")}

    def command(self) -> str:
        """The same measurement on the command line."""
        parts = ["python -m lab coverage", f"--d {self.d}", *(f"--method {id}" for id in self.methods)]
        parts += [f"--params {','.join(map(str, self.wanted()))}", f"--seed {self.seed}" if self.seed else ""]
        parts += ["--with-start" if self.start else "", f"--target {self.target}" if self.target else ""]
        return " ".join(p for p in parts if p)


def view(given: Mapping[str, Any]) -> View:
    """A checked view from loose values: of the controls, or of an address (`View.link`'s names).

    Raises LabError in one sentence on values that do not fit.
    """
    d = curves.layer(given.get("d", 16)).m
    methods = given.get("m", DEFAULT_METHODS)
    ids = [id for id in (methods.split(",") if isinstance(methods, str) else methods) if id]
    if len(ids) > MAX_METHODS:
        raise LabError(f"Choose at most {MAX_METHODS} methods.")
    for id in ids:
        if id not in METHODS:
            raise unknown("method", str(id)[:60], METHODS.ids())
    what = given.get("show", "coverage")
    if what not in WHAT:
        raise LabError(f"What is shown is one of {', '.join(WHAT)}, got '{str(what)[:30]}'.")
    share = _number(given.get("upto", 1), "The largest count, as a share of d²,", 0.01, 4)
    seed = _number(given.get("seed", 0), "The seed", 0, 2**32 - 1)
    text = str(given.get("n") or "").replace(";", ",").replace(" ", ",")
    typed = [part for part in text.split(",") if part]
    counts = tuple(curves.check_counts(typed[:200], d)) if typed else ()
    yes = (True, "1", "true")
    return View(
        d, tuple(dict.fromkeys(ids)), share, counts, what, given.get("a0") in yes, given.get("log") in yes, int(seed)
    )


def _number(value: Any, what: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LabError(f"{what} must be a number, got '{str(value)[:20]}'.") from None
    if not low <= number <= high or (high > 100 and number != int(number)):
        raise LabError(f"{what} must be between {low:g} and {high:,.0f}, got {number:g}.")
    return number


@dataclass
class Answer:
    """What is known so far. `drawn` is what the plot takes, `rows` the measured points, `notes` what to say beside."""

    view: View
    drawn: list[Record]
    rows: list[Record]
    notes: dict[str, str]
    running: str = ""  # the method being measured and how far it is


def answers(asked: View) -> Iterator[Answer]:
    """The plot as it fills: closed forms at once, then points, method by method, those of equations first."""
    lines = {id: _line(asked, id) for id in asked.methods}
    points: dict[str, list[Record]] = {id: [] for id in asked.methods}
    notes: dict[str, str] = {}
    last = 0.0

    def now(running: str = "") -> Answer:
        drawn = [_drawn(asked, id, lines[id], points[id]) for id in asked.methods if lines[id] or points[id]]
        return Answer(asked, drawn, [r for id in asked.methods for r in points[id]], dict(notes), running)

    order, many = sorted(asked.methods, key=apart.needed), len(asked.wanted())
    for id in order:
        name = METHODS[id].name
        if not asked.large and (time.monotonic() - last > PAINT_S or apart.needed(id)):
            last = time.monotonic()
            yield now(name)
        try:
            for record in _points(asked, id):
                points[id].append(record)
                if not asked.large and time.monotonic() - last > 2 * PAINT_S:
                    last = time.monotonic()
                    yield now(f"{name}, {len(points[id])} of {many} points")
        except LabError as problem:
            notes[id] = str(problem)
    yield now()


def _line(asked: View, id: str) -> list[list[float]]:
    key = KEYS[asked.kind][1]
    if not key or id not in FORMS:
        return []
    counts = asked.wanted()
    low, high = counts[0], counts[-1]
    grid = sorted({*counts, *(round(low + (high - low) * i / 24) for i in range(25))})
    try:
        rows = curves.line(id, asked.d, grid, start=asked.start)
    except LabError:
        return []
    return [[r["trainable_parameters"], r[key]] for r in rows if r["trainable_parameters"] <= 1.5 * high]


def _points(asked: View, id: str) -> Iterator[Record]:
    """The method's points, each setting once. Of large layers those that are known; the queue measures the others."""
    if asked.large:
        found: Any = (r for n in asked.wanted() if (r := curves.remembered(_question(asked, id, n))) is not None)
    elif apart.needed(id):
        found = apart.curve(id, asked.d, asked.wanted(), seed=asked.seed, target=asked.target)
    else:
        found = (measured(asked, id, n) for n in asked.wanted())
    seen = set()
    for record in found:
        if record["trainable_parameters"] not in seen:
            seen.add(record["trainable_parameters"])
            yield record


def measured(asked: View, id: str, n: int) -> Record:
    """One point of the view, in this process. Raises LabError."""
    return curves.point(_question(asked, id, n))


def missing(asked: View) -> list[tuple[str, int]]:
    """(method, parameters) of the points of a large layer that nobody has measured yet."""
    return [
        (id, n)
        for id in asked.methods
        for n in asked.wanted()
        if asked.large and curves.remembered(_question(asked, id, n)) is None
    ]


def _question(asked: View, id: str, n: int) -> curves.Question:
    own = apart.needed(id)  # those have spectra always, and a start of their own
    return curves.Question(id, asked.d, n, asked.seed, start=asked.start and not own, target=asked.target, spectra=own)


def _drawn(asked: View, id: str, line: list[list[float]], rows: list[Record]) -> Record:
    key = KEYS[asked.kind][0]
    points = sorted([r["trainable_parameters"], r[key], hover(r)] for r in rows if r.get(key) is not None)
    return {"method": id, "name": METHODS[id].name, "line": line, "points": points}


def hover(record: Record) -> str:
    """A point in words, with line breaks as plotly writes them."""
    lines = [f"<b>{record['name']}</b>, d = {record['d']}, n = {record['trainable_parameters']:,}", words(record)]
    if record.get("error") is not None:
        lines.append(f"error {record['error']:.4g}, by {record['fitted_by']}")
    elif record["rank"] is not None:
        lines.append(f"span {record['rank']:,} of {record['d'] ** 2:,} = {record['coverage']:.4g}")
        local = "not measured" if record["local_dimension"] is None else f"{record['local_dimension']:,}"
        lines.append(f"local dimension {local}, rank of one update {record['update_rank']}")
    lines.append(f"measured in {record['seconds']:.3g} s")
    return "<br>".join(line for line in lines if line)


def words(record: Record) -> str:
    """The settings that matter: sizes and ranks."""
    method = METHODS[record["method"]]
    names = {f.name for f in budget.knob_fields(method, size=True)} | {"r", "rank", "block", "blocks"}
    return ", ".join(
        f"{k} = {v:g}"
        for k, v in record["knobs"].items()
        if k in names and isinstance(v, (int, float)) and v is not True
    )


def spectrum(asked: View, id: str, n: int) -> Record:
    """The point with its spectra (a large layer's as the queue measured it: a span that was proved to be everything has
    none). Raises LabError."""
    if asked.large:
        if (found := curves.remembered(_question(asked, id, n))) is None:
            raise LabError("This point is not measured yet.")
        return found
    if apart.needed(id):
        rows = apart.curve(id, asked.d, asked.wanted(), seed=asked.seed)
        return next((r for r in rows if r["trainable_parameters"] == n or r["params"] == n), rows[0])
    return curves.point(curves.Question(id, asked.d, n, asked.seed, start=asked.start))


COLUMNS = ("method", "d", "params", "trainable_parameters", "rank", "coverage", "closed_form", "closed_form_rank",
           "local_dimension", "local_closed_form", "update_rank", "update_rank_closed_form", "error", "fitted_by", "settings", "samples",
           "smallest_kept", "largest_dropped", "tolerance", "seed", "seconds", "note")  # fmt: skip


def as_csv(answer: Answer) -> str:
    """The measured points as CSV, numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in answer.rows:
        full = {**row, "seed": answer.view.seed, "settings": words(row).replace(" = ", "=").replace(", ", " ")}
        writer.writerow(["" if full.get(name) is None else full[name] for name in COLUMNS])
    return out.getvalue()
