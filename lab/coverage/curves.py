"""A method's points over parameter counts: settings from the row's solver, closed forms, measurements, kept for reuse."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab import budget
from lab.coverage import fit, kept, maps, measure
from lab.coverage.closed import closed_form
from lab.errors import LabError
from lab.methods import METHODS
from lab.methods.spec import Layer, Method

MAX_D = 64
MAX_LOCAL = (
    1 << 26
)  # numbers in a Jacobian; beyond it (d = 64 with thousands of parameters) the local dimension is left out
SHOWN = 200  # singular values kept for the spectrum plot
KEPT = 4096
LARGE_D = 32  # beyond it a point takes seconds and up to 0.4 GB: the page leaves them to the queue
KEEP_S = 0.02  # what takes less is measured again sooner than it is read

Record = dict[str, Any]


def layer(d: Any) -> Layer:
    """The one layer that is looked at. Raises LabError unless d is a whole number from 2 to MAX_D."""
    if isinstance(d, bool) or not str(d).strip().lstrip("-").isdigit() or not 2 <= int(d) <= MAX_D:
        raise LabError(f"d must be a whole number from 2 to {MAX_D}, got '{str(d)[:20]}'.")
    return Layer("layer", int(d), int(d))


def settings(method: Method, d: int, n: Any, given: dict[str, Any] | None = None) -> budget.Solution:
    """Settings of the method with the number of trained numbers nearest to n on a d×d layer.

    What is `given` stays. Where n leaves a choice, the one with the widest span is taken: NoRA's r_outer as large as n
    or d allows, then its r_inner, never above n; TinyLoRA's r with r² ≥ u; NOLA's k = l with the paper's uniform basis. Ranks that cost nothing are held at d or below. Raises LabError when the method fits no such layer.
    """
    one, given = [layer(d)], dict(given or {})
    fixed = list(given)
    number = budget.check_budget(n)
    names = {f.name: f for f in budget.knob_fields(method)}
    if method.id == "nola":
        given.setdefault("basis", "uniform")
        if not {"k", "l"} & set(given) and number > 1:
            given |= {"k": number // 2, "l": number - number // 2}
    if method.id == "pranc":
        given.setdefault("k", number)
    if method.id == "nora" and "r_outer" not in given:
        if "r_inner" not in given:  # the widest within n: r_outer first, as far as d, then r_inner
            given["r_inner"] = min(d, max(1, number // (2 * d)))
            given["r_outer"] = min(d, max(1, number // 2))
            return _as_given(method, one[0], number, method.knobs.parse(given))
        inner = max(1, int(given["r_inner"]))
        given["r_outer"] = min(d, max(inner, number // (2 * inner)))
    if method.id == "tinylora" and "r" not in given:
        given["r"] = min(d, max(1, math.isqrt(number - 1) + 1))
    if method.id == "gralora" and "blocks" not in given:
        given["blocks"] = 2 if d % 2 == 0 else 1
        given["r"] = given.get("r", given["blocks"])
    for name, field in names.items():
        if name in ("block", "vector_length", "group") and name not in given and isinstance(field.default, int):
            given[name] = math.gcd(field.default, d)
        if (
            name in ("r", "rank")
            and not field.metadata["size"]
            and name not in given
            and isinstance(field.default, int)
        ):
            given[name] = min(field.default, d)
    knobs = method.knobs.parse(given)
    try:  # the solver's own answer where it is known beforehand: a curve asks for many
        if method.id in ("nola", "pranc") and method.count_layer(one[0], knobs) == number:
            return _as_given(method, one[0], number, knobs)
    except LabError:
        pass
    return budget.solve(method, one, number, knobs, fixed=fixed)


def _as_given(method: Method, one: Layer, n: int, knobs: Any) -> budget.Solution:
    budget.check(method, [one], knobs)
    count = method.count_layer(one, knobs)
    return budget.Solution(knobs, count, count - n)


def check_counts(counts: Sequence[Any], d: int) -> list[int]:
    """Parameter counts, growing, each once. Raises LabError unless there are 1 to 64 of them, each from 1 to 4·d²."""
    found = sorted({budget.check_budget(n) for n in counts})
    if not 1 <= len(found) <= 64:
        raise LabError(f"Give 1 to 64 parameter counts, got {len(found)}.")
    if found[-1] > 4 * d * d:
        raise LabError(f"{found[-1]:,} parameters are more than 4·d² = {4 * d * d:,} for a {d}×{d} layer: give fewer.")
    return found


# -- points ----------------------------------------------------------------------------------------------------
def base(method: Method, d: int, n: int, given: dict[str, Any] | None, *, start: bool) -> tuple[Record, Any]:
    """What is known of a point before anything is measured, and its settings."""
    found = settings(method, d, n, given)
    closed = closed_form(method.id, d, found.knobs, start=start)
    record = {
        "method": method.id,
        "name": method.name,
        "d": d,
        "params": n,
        "rank": None,
        "coverage": None,
        "closed_form": closed.span / d**2 if closed else None,
        "trainable_parameters": found.count,
        "closed_form_rank": closed.span if closed else None,
        "local_closed_form": closed.local if closed else None,
        "update_rank_closed_form": closed.rank if closed else None,
        "knobs": budget.as_dict(found.knobs),
        "note": found.note,
    }
    return record, found.knobs


def automatic(d: int, share: float = 1.0) -> list[int]:
    """Ten parameter counts up to this share of d², denser where curves bend."""
    parts = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
    return sorted({max(2, round(share * d * d * part)) for part in parts})


def line(id: str, d: int, counts: Sequence[int], given: dict[str, Any] | None = None, *, start: bool) -> list[Record]:
    """Closed forms alone, a record for each number of parameters that the method really reaches."""
    rows, seen = [], set()
    for n in counts:
        record, _ = base(METHODS[id], d, n, given, start=start)
        if record["closed_form"] is not None and record["trainable_parameters"] not in seen:
            seen.add(record["trainable_parameters"])
            rows.append(record)
    return sorted(rows, key=lambda r: r["trainable_parameters"])


_known: OrderedDict[str, Record] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class Question:
    """What a point is asked, in full: of a method, on a d×d layer, with about n trained numbers.

    Settings in `given` are held. `start` samples NOLA with the frozen A₀ of its authors' code. With a `target` the point is a
    fit to it. Without `spectra` a span that is everything is certified without its singular values, which is much faster.
    """

    method: str
    d: int
    n: int
    seed: int = 0
    given: dict[str, Any] | None = None
    start: bool = False
    target: str = ""
    spectra: bool = True

    @property
    def key(self) -> str:
        return json.dumps({**vars(self), "given": sorted((self.given or {}).items())}, default=str)


def point(asked: Question) -> Record:
    """One measured point. Keys beside those of `base`: local_dimension, update_rank, samples, smallest_kept,
    largest_dropped, tolerance, clear, seconds, spectrum, local_spectrum; with a target, error and fitted_by.

    Measured once, then remembered. Raises LabError on an unknown method, and when the method does not fit such a layer or
    is no change of one weight.
    """
    if (known := remembered(asked)) is not None:
        return known
    method, d, began = METHODS[asked.method], asked.d, time.perf_counter()
    record, knobs = base(method, d, asked.n, asked.given, start=asked.start)
    with maps.on_weight(fit.base_weight(asked.target, d)):
        update = update_map(method, d, knobs, asked.seed, start=asked.start)
        record |= _fitted(asked, update, knobs) if asked.target else _measured(asked, update, knobs)
    record["seconds"] = round(time.perf_counter() - began, 4)
    if record["seconds"] >= KEEP_S or d > LARGE_D:
        kept.write(asked.key, record)
    return _remember(asked.key, record)


def remembered(asked: Question) -> Record | None:
    """The point of this question if it was measured before, in this process or another; None otherwise."""
    key = asked.key
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    found = kept.read(key)
    return None if found is None else _remember(key, found)


def _remember(key: str, record: Record) -> Record:
    with _lock:
        _known[key] = record
        while len(_known) > KEPT:
            _known.popitem(last=False)
    return record


def update_map(method: Method, d: int, knobs: Any, seed: int, *, start: bool = False) -> maps.UpdateMap:
    """The method's equation, or, where `maps` has none, its own code (which imports torch)."""
    if method.id == "nola" and start:
        return maps.nola_started(d, knobs, seed)
    if method.id in maps.MAPS:
        return maps.MAPS[method.id](d, knobs, seed)
    from lab.coverage import _torch_maps

    return _torch_maps.code(method, d, knobs, seed)


def _measured(asked: Question, update: maps.UpdateMap, knobs: Any) -> Record:
    closed, seed = closed_form(asked.method, asked.d, knobs, start=asked.start), asked.seed
    span = measure.span(update, seed, closed.span if closed else None, values=asked.spectra)
    jacobian = measure.local(update, seed) if update.size * update.d**2 <= MAX_LOCAL else None
    one = measure.one(update, seed)
    return {
        "rank": span.rank,
        "coverage": span.rank / update.d**2,
        "local_dimension": jacobian.rank if jacobian else None,
        "update_rank": one.rank,
        "samples": span.samples,
        "smallest_kept": span.kept,
        "largest_dropped": span.dropped,
        "tolerance": measure.TOLERANCE,
        "clear": span.clear and one.clear and (jacobian is None or jacobian.clear),
        "spectrum": _thin(span),
        "local_spectrum": _thin(jacobian) if jacobian else [],
        "update_spectrum": _thin(one),
    }


def _thin(found: measure.Spectrum) -> list[list[float]]:
    """[index from 1, value] of at most SHOWN values, the first, the last and both sides of the rank among them."""
    import numpy as np

    many = len(found.values)
    if not many:
        return []
    at = np.unique(np.linspace(0, many - 1, min(SHOWN, many)).round().astype(int))
    at = sorted({*at.tolist(), max(0, found.rank - 1), min(many - 1, found.rank)})
    return [[i + 1, float(f"{max(found.values[i], 1e-17):.3g}")] for i in at]


def _fitted(asked: Question, update: maps.UpdateMap, knobs: Any) -> Record:
    if asked.target not in fit.TARGETS:
        raise LabError(f"The target is one of {', '.join(fit.TARGETS)}, got '{asked.target[:20]}'.")
    goal = fit.target(asked.target, asked.d, asked.seed)
    found, how = fit.error(asked.method, update, knobs, goal, asked.seed)
    more = {} if found is not None else {"note": f"more than {fit.MAX_FIT} parameters are not fitted here"}
    return {"error": found, "fitted_by": how} | more


def curve(id: str, d: int, counts: Sequence[int], **options: Any) -> list[Record]:
    """`point` for every count, with `Question`'s options; counts that the method answers with the same settings are measured once."""
    found: dict[str, Record] = {}
    rows = []
    for n in counts:
        record, _ = base(METHODS[id], d, n, options.get("given"), start=options.get("start", False))
        same = json.dumps(record["knobs"], default=str)
        if same not in found:
            found[same] = point(Question(id, d, n, **options))
        rows.append({**found[same], "params": n, "note": found[same]["note"] or record["note"]})
    return rows


def plain(record: Record) -> Record:
    """The record without its spectra."""
    return {k: v for k, v in record.items() if not k.endswith("spectrum")}
