"""Plots draw what they are given, also when that is nothing, and methods keep their colours."""

from __future__ import annotations

import itertools
import json

import pytest

from lab.methods import METHODS
from lab.plots import PLOTS, colour, tint
from lab.plots.loss import smooth, thin

ROWS = [
    {"method": "base", "name": "Base", "clip_i": 0.5, "clip_i_spread": None, "clip_t": 0.3, "clip_t_spread": None},
    {
        "method": "nora",
        "name": "NoRA",
        "clip_i": 0.7,
        "clip_i_spread": 0.01,
        "clip_t": 0.28,
        "clip_t_spread": 0.02,
        "trainable_parameters": 4096,
    },
]


def luminance(paint: str) -> float:
    parts = [int(paint[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("method", [*METHODS.ids(), "base"])
def test_colour_reads_on_both_pages(method: str) -> None:
    for page in ("#fbfaf7", "#101615"):
        assert contrast(colour(method), page) >= 2.4


def test_colours_of_the_usual_methods_differ() -> None:
    usual = ["base", "lora", "nora", "nola", "pranc", "dora", "adalora", "vera"]
    for a, b in itertools.combinations(usual, 2):
        assert sum(abs(int(colour(a)[i : i + 2], 16) - int(colour(b)[i : i + 2], 16)) for i in (1, 3, 5)) > 60, (a, b)


def test_colour_depends_on_the_name_alone() -> None:
    assert colour("a-method-of-tomorrow") == colour("a-method-of-tomorrow")
    assert tint("#ff8000", 0.5) == "rgba(255,128,0,0.5)"


def test_smooth_keeps_a_constant_and_follows_a_step() -> None:
    assert smooth([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    assert smooth([1.0], 10) == pytest.approx([1.0])
    stepped = smooth([0.0] * 20 + [1.0] * 40, 5)
    assert stepped[19] == pytest.approx(0, abs=1e-9)
    assert stepped[-1] == pytest.approx(1, abs=1e-3)


def test_thin_keeps_first_and_last() -> None:
    for count in (0, 1, 5, 239, 240, 241, 10_001):
        kept = thin(list(range(count)), 240)
        assert len(kept) <= 241
        assert kept[:1] + kept[-1:] == list(range(count))[:1] + list(range(count))[-1:]


def test_loss_curves_have_their_methods_colours_and_no_nan() -> None:
    losses = [(1, 0.5), (2, float("nan")), (3, 0.25)]
    records = [{"method": m, "name": m, "seed": s, "losses": losses} for m in ("lora", "nora") for s in (0, 1)]
    fig = PLOTS["loss"].draw(records, steps=3)
    named = [trace for trace in fig.data if trace.name]
    assert [trace.line.color for trace in named] == [colour("lora")] * 2 + [colour("nora")] * 2
    assert list(named[0].x) == [1, 3]
    assert "NaN" not in fig.to_json()


def test_scores_show_their_spread() -> None:
    bars = [trace.error_x.array for trace in PLOTS["scores"].draw(ROWS).data if trace.error_x.array is not None]
    assert [list(bar) for bar in bars] == [[0.01], [0.02]]


def test_tradeoff_has_a_point_for_each_trained_method() -> None:
    fig = PLOTS["tradeoff"].draw(ROWS)
    assert [(trace.x[0], trace.y[0]) for trace in fig.data] == [(4096, 0.7)]


@pytest.mark.parametrize("plot", ["loss", "scores", "tradeoff"])
@pytest.mark.parametrize("records", [[], [{"method": "lora", "name": "LoRA", "seed": 0, "losses": []}]])
def test_nothing_to_draw_is_a_sentence(plot: str, records: list[dict]) -> None:
    text = json.loads(PLOTS[plot].draw(records).to_json())["layout"]["annotations"]
    assert any(note["text"].endswith(".") for note in text)
