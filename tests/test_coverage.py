"""The coverage of updates: closed forms against measurements, equations against the methods' own code."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lab import cli
from lab.coverage import Question, closed_form, curve, maps, measure, point
from lab.coverage.closed import FORMS
from lab.coverage.curves import base, check_counts, layer, settings
from lab.errors import LabError
from lab.methods import METHODS
from tests.coverage_helpers import made

pytestmark = pytest.mark.usefixtures("module_home")


def measured(update: maps.UpdateMap, expected: int) -> tuple[int, int, int]:
    found = measure.span(update, 1, expected), measure.local(update, 1), measure.one(update, 1)
    assert all(s.clear for s in found)
    return tuple(s.rank for s in found)  # type: ignore[return-value]


@pytest.mark.parametrize("id", list(maps.MAPS))
def test_closed_forms_are_what_is_measured(id: str) -> None:
    for d, n in ((5, 9), (6, 24), (8, 20), (8, 50), (9, 60)):
        for start in (False, True) if id == "nola" else (False,):
            update, knobs = made(id, d, n, start=start)
            closed = closed_form(id, d, knobs, start=start)
            assert closed is not None
            assert update.size == METHODS[id].count_layer(layer(d), knobs)
            assert measured(update, closed.span) == (closed.span, closed.local, closed.rank), (d, knobs)


def test_methods_own_code_has_the_closed_forms_dimensions() -> None:
    from lab.coverage import _torch_maps

    for id in FORMS:
        knobs = settings(METHODS[id], 6, 26).knobs
        closed = closed_form(id, 6, knobs, start=True)  # NOLA's code has its frozen A₀
        assert closed is not None
        assert measured(_torch_maps.code(METHODS[id], 6, knobs, 0), closed.span) == (
            closed.span,
            closed.local,
            closed.rank,
        ), id


def test_equations_give_the_numbers_of_the_code() -> None:
    """NOLA's and PRANC's maps on the bases that their code draws, and NoRA's on W, against the code's own update."""
    import torch

    from lab import counter
    from lab.coverage import _torch_maps
    from lab.methods import _basis

    rng = np.random.default_rng(3)
    d = 6
    for id, given in (("nola", {"k": 5, "l": 4, "r": 3}), ("pranc", {"k": 7}), ("nora", {"r_outer": 5, "r_inner": 2})):
        method = METHODS[id]
        knobs: Any = method.knobs.parse(given)
        code = _torch_maps.code(method, d, knobs, 0)
        theta = rng.standard_normal((3, code.size))
        if id == "nola":
            keys = {side: counter.key("nola", 0, "layer", side) for side in ("a", "b", "a0")}
            A, B = (_basis.vectors("hadamard", k, keys[s], 3 * d).numpy() for k, s in ((5, "a"), (4, "b")))
            A0 = counter.uniform(keys["a0"], range(1), range(3 * d))[0].numpy() * d**-0.5
            ours = maps.nola(d, knobs, 0, (A, B, A0)).delta(theta) / 3  # c/r
        elif id == "pranc":
            v = _basis.vectors("uniform", 7, counter.key("pranc", 0, "layer"), d * d)
            ours = theta @ v.double().numpy()
        else:  # singular vectors have no sign of their own: compare with X = 0 in their place
            flipped = torch.from_numpy(maps.weight(d, 0)).float()
            U, _, Vt = np.linalg.svd(flipped.double().numpy())
            ours = code.delta(theta)
            inside = U[:, :5] @ U[:, :5].T @ ours.reshape(-1, d, d) @ Vt[:5].T @ Vt[:5]
            assert np.allclose(inside.reshape(3, -1), ours, atol=1e-5)
            assert np.linalg.matrix_rank(ours[0].reshape(d, d), 1e-6) == 4
            continue
        assert np.allclose(ours, code.delta(theta), rtol=1e-4, atol=1e-5), id


def test_figure_2() -> None:
    """PRANC grows linearly to one; NOLA with k = l = n/2 has (n/2)² until that is d²."""
    d, counts = 12, [4, 8, 16, 24, 36, 100, 144]
    pranc, nola = (curve(id, d, counts) for id in ("pranc", "nola"))
    assert [p["rank"] for p in pranc] == counts
    assert [p["rank"] for p in nola] == [min((n // 2) ** 2, d * d) for n in counts]
    assert [p["coverage"] for p in nola] == [p["closed_form"] for p in nola]
    assert point(Question("nola", d, 8, start=True))["rank"] == 4 * 5  # A₀ is one more A


def test_faster_ways_agree_with_plain_ones() -> None:
    for id, n in (("nola", 12), ("hira", 40), ("vera", 14), ("pranc", 20)):
        update, knobs = made(id, 7, n)
        closed = closed_form(id, 7, knobs)
        assert closed is not None
        gram, plain = (measure.span(update, 0, closed.span, gram=g) for g in (True, False))
        assert gram.rank == plain.rank == measure.span(update, 0).rank == closed.span
        assert np.allclose(gram.values[: gram.rank], plain.values[: gram.rank], rtol=1e-3)
        assert measure.span_by_tangents(update, 0, closed.span).rank == closed.span
        quick = measure.span(update, 0, closed.span, values=False)
        assert quick.rank == closed.span
        assert quick.clear
        assert bool(quick.certified) == (closed.span == 49)


def test_a_span_that_is_nearly_everything_is_not_certified() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 40))
    assert measure.fills([rows[:25], rows[25:]])
    rows[:, 7] = rows[:, 8] * (1 + 1e-9)
    assert not measure.fills([rows[:25], rows[25:]])
    assert measure.spectrum(rows).rank == 39
    assert not measure.fills([rows[:39]])


def test_derivatives() -> None:
    for id in ("nora", "dora", "loha", "lokr", "pranc", "gralora"):
        update, _ = made(id, 6, 30)
        theta = update.draw(np.random.default_rng(1), 1)[0]
        step = 1e-6 * np.eye(update.size)
        slope = (update.delta(theta + step) - update.delta(theta - step)) / 2e-6
        assert np.allclose(update.jacobian(theta), slope, atol=1e-7), id


def test_points_are_the_same_again() -> None:
    from lab.coverage import curves

    first = point(Question("nola", 9, 14, seed=5))
    curves._known.clear()
    again = point(Question("nola", 9, 14, seed=5))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert point(Question("nola", 9, 14, seed=6))["spectrum"] != first["spectrum"]
    assert point(Question("nola", 9, 14, seed=6)) is point(Question("nola", 9, 14, seed=6))  # kept


def test_settings_are_the_widest() -> None:
    assert settings(METHODS["nora"], 16, 16).knobs.r_outer == 8
    assert settings(METHODS["nora"], 16, 16, {"r_inner": 2}).knobs.r_outer == 4
    nola = settings(METHODS["nola"], 4, 10)
    assert (nola.knobs.k, nola.knobs.l, nola.knobs.r, nola.count) == (5, 5, 4, 10)
    assert "floor" in base(METHODS["lora"], 16, 8, None, start=False)[0]["note"]


@pytest.mark.parametrize("d", ["1", "65", "x", "-3", "", "7.5", None, True])
def test_bad_sides(d: Any) -> None:
    with pytest.raises(LabError, match="d must be a whole number from 2 to 64"):
        layer(d)


def test_bad_counts() -> None:
    with pytest.raises(LabError, match="1 to 64 parameter counts"):
        check_counts([], 8)
    with pytest.raises(LabError, match="at least 1"):
        check_counts([0], 8)
    with pytest.raises(LabError, match="more than 4·d²"):
        check_counts([257], 8)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coverage", "--d", "16", "--method", "nola", "--params", "8,16,32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["d"], r["params"], r["rank"], r["coverage"], r["closed_form"]) for r in rows] == [
        ("nola", 16, 8, 16, 16 / 256, 16 / 256),
        ("nola", 16, 16, 64, 64 / 256, 64 / 256),
        ("nola", 16, 32, 256, 1.0, 1.0),
    ]
    assert cli.main(["coverage", "--d", "8", "--params", "16", "--method", "lora", "--method", "pranc"]) == 0
    assert "pranc" in capsys.readouterr().out
    assert cli.main(["coverage", "--d", "8", "--params", "16", "--method", "vera", "--target", "low"]) == 0
    assert "variable projection" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--d", "0"],
        ["--method", "nothing"],
        ["--params", "8,x"],
        ["--set", "lora.r=2", "--method", "nola"],
        ["--seed", "-1"],
    ],
)
def test_bad_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coverage", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1


def test_needs_no_torch() -> None:
    script = "import sys, lab.coverage as c; c.curve('nola', 8, [4, 8]); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


# -- the tab ---------------------------------------------------------------------------------------------------
def values(**given: Any) -> dict[str, Any]:
    return {"d": 6, "m": ["pranc", "nola", "lora"], "upto": 1, "n": "", "show": "coverage", "seed": 0, **given}


def test_tab_draws_closed_forms_first_and_points_after() -> None:
    from lab.ui.coverage import drawn

    steps = list(drawn(values()))
    first, last = steps[0], steps[-1]
    assert [t.name for t in first[0].data] == ["PRANC", "PRANC", "NOLA", "NOLA", "LoRA", "LoRA"]
    assert first[0].data[0].mode == "lines"
    assert first[0].data[1].x == (None,)
    assert "Measuring" in first[1]
    points = last[0].data[1]
    assert all(y == pytest.approx(x / 36) for x, y in zip(points.x, points.y, strict=True))
    assert "span 36 of 36 = 1" in points.text[-1]
    assert "k = 36" in points.text[-1]
    assert 'class="r num other"' not in last[2]  # every measurement is its closed form
    assert "python -m lab coverage --d 6 --method pranc --method nola --method lora --params 2," in last[2]


@pytest.mark.parametrize("show", ["local", "rank", "error-full", "error-low", "error-real"])
def test_tab_shows_every_measure(show: str) -> None:
    from lab.ui.coverage import drawn

    for step in drawn(values(show=show, log=True)):
        last = step
    named = {t.name for t in last[0].data}
    assert named == {"PRANC", "NOLA", "LoRA"}
    assert all(min(t.y) >= 0 for t in last[0].data if t.y)
    if show == "error-full":
        assert last[0].data[0].y[-1] < 1e-6  # PRANC with d² vectors reaches everything
        assert "least squares" in last[2]


def test_tab_says_what_does_not_fit() -> None:
    from lab.ui.coverage import drawn

    for bad in ({"d": 99}, {"m": ["nothing"]}, {"n": "3, x"}, {"show": "all"}, {"upto": "many"}, {"seed": -1}):
        (only,) = drawn(values(**bad))
        assert 'role="alert"' in only[1]


def test_link_reproduces_the_view() -> None:
    from lab.coverage import report
    from lab.ui.coverage import NAMES, landed

    asked = report.view(values(n="4, 9 16", show="error-low", a0=True, log=True, seed=7))
    assert asked.counts == (4, 9, 16)
    again = report.view(asked.link())
    assert again == asked
    assert report.View().link() == {"d": "16"}
    assert report.view(report.View(d=8).link()) == report.View(d=8)
    shown = dict(zip([*NAMES, "open"], landed({"tab": "coverage", **asked.link()}), strict=True))
    assert shown["m"] == ["pranc", "nola", "lora"]
    assert shown["n"] == "4, 9, 16"
    assert shown["open"] is True
    assert landed({"tab": "budget"})[-1] is False


def test_csv_and_spectrum() -> None:
    import csv
    import io

    from lab.coverage import report
    from lab.ui.coverage import one_spectrum

    asked = report.view(values(n="4,8", m="nola,pranc"))
    *_, answer = report.answers(asked)
    rows = list(csv.DictReader(io.StringIO(report.as_csv(answer))))
    assert [(r["method"], r["params"], r["rank"], r["closed_form_rank"]) for r in rows] == [
        ("nola", "4", "4", "4"), ("nola", "8", "16", "16"), ("pranc", "4", "4", "4"), ("pranc", "8", "8", "8"),
    ]  # fmt: skip
    figure = one_spectrum(values(n="4,8"), "nola 8")
    span = figure.data[0]
    assert sum(y > 1e-6 for y in span.y) == 16
    assert max(span.y) == 1
    assert len(one_spectrum(values(), "nothing")["data"]) == 0


def test_other_methods_are_measured_by_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.coverage import apart, report

    asked = []

    def run(arguments: list[str]) -> list[dict[str, Any]]:
        asked.append(arguments)
        return curve("ia3", 6, [6])

    monkeypatch.setattr(apart, "_run", run)
    view = report.view(values(m="oft,pranc"))
    *_, answer = report.answers(view)
    assert asked[0][:5] == ["coverage", "--d", "6", "--method", "oft"]
    assert {r["method"] for r in answer.rows} == {"ia3", "pranc"}
    list(report.answers(view))
    assert len(asked) == 1  # kept


def test_a_failing_process_is_told_in_its_own_sentence() -> None:
    from lab.coverage import apart

    with pytest.raises(LabError, match="Unknown method 'nop'"):
        apart.curve("nop", 6, [4])
