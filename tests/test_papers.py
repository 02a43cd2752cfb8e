"""The papers' tables: every printed parameter count is reproduced, or the remark says why not."""

from __future__ import annotations

import pytest

from lab import papers
from lab.errors import LabError

EVERY = [count for table in papers.tables() for count in papers.counts(table)]


def test_both_papers_are_there_in_full() -> None:
    assert {t for t in papers.tables() if t.startswith("nora")} == {"nora-table-1", "nora-table-2"}
    assert {int(t.rsplit("-", 1)[1]) for t in papers.tables() if t.startswith("nola")} == set(range(1, 12))
    assert len(EVERY) > 75
    assert len(papers.rows("nora-table-2")) == 34


@pytest.mark.parametrize("count", EVERY, ids=lambda c: f"{c.table}: {c.label} {c.printed}")
def test_a_count_agrees_or_says_why_not(count: papers.Count) -> None:
    assert count.agrees or len(count.remark) > 20, (count.configuration, count.shown)


@pytest.mark.parametrize(
    ("table", "label", "ours"),
    [
        ("nora-table-1", "LLaMA-1 7B, LoRA (r=16)", 8_388_608),
        ("nora-table-1", "LLaMA-1 7B, LoRA (r=32)", 16_777_216),
        ("nora-table-1", "LLaMA-1 7B, NoRA", 8_192_000),
        ("nora-table-1", "LLaMA-3 8B, LoRA", 28_311_552),
        ("nora-table-1", "LLaMA-3 8B, LoKr", 901_120),
        ("nora-table-1", "LLaMA-3 8B, AdaLoRA", 28_314_112),
        ("nora-table-1", "LLaMA-3 8B, NoRA", 7_168_000),
        ("nora-table-1", "LLaMA-3 8B, NoRA (abstract)", 10_240_000),
        ("nola-table-1", "GPT-2 M, LoRA, QV, 1", 98_304),
        ("nola-table-1", "GPT-2 L, LoRA, QV, 1", 184_320),
        ("nola-table-5", "LLaMA-2 7B, LoRA, 1", 2_498_560),
        ("nola-table-5", "LLaMA-2 70B, LoRA, 1", 12_943_360),
        ("nola-table-5", "LLaMA-2 7B, NOLA, 16", 57_344),
        ("nola-table-5", "LLaMA-2 13B, NOLA, 16", 143_360),
        ("nola-table-5", "LLaMA-2 70B, NOLA, 16", 573_440),
        ("nola-table-6", "ViT-B, LoRA (r=4)", 147_456),
        ("nola-table-7", "ViT-B, NOLA-MLP", 49_152),
        ("nola-table-8", "ResNet20, CIFAR-10, NOLA", 12_876),
        ("nola-table-8", "ResNet20, CIFAR-10, trained model", 269_722),
        ("nola-table-9", "ResNet18, ImageNet-100, NOLA", 109_600),
        ("nola-table-9", "ResNet18, ImageNet-100, trained model", 11_227_812),
    ],
)
def test_counts_that_are_reproduced_exactly(table: str, label: str, ours: int) -> None:
    [count] = [c for c in papers.counts(table) if c.label == label]
    assert count.ours == ours
    assert count.agrees


def test_what_does_not_fit_is_known() -> None:
    odd = {(c.table, c.row["method"], c.printed) for c in EVERY if not c.agrees}
    assert ("nola-table-11", "Adapter^L", "230.000M") in odd  # ten times the 23.000M of Table 1
    assert ("nola-table-6", "Full-FT", "5.3M") in odd  # the size of ViT-Ti
    assert all(table.startswith("nola") for table, _, _ in odd)
    assert not [
        c for c in EVERY if c.table in ("nola-table-2", "nola-table-3", "nola-table-5", "nola-table-7") and not c.agrees
    ]


def test_a_number_as_the_paper_writes_it() -> None:
    assert papers.like("0.096M", 96_000) == "0.096M"
    assert papers.like("12,752", 12_752) == "12,752"
    assert papers.like("141K", 147_456, "1024²") == "141K"
    assert papers.like("0.370M", 368_784) == "0.37M"
    with pytest.raises(LabError, match="cannot be read"):
        papers.like("many", 3)


@pytest.mark.parametrize("text", ["2 ** x", "__import__('os')", "nothing of gpt2", "9/3", ""])
def test_a_configuration_is_no_code(text: str) -> None:
    with pytest.raises(LabError):
        papers.evaluate(text)


def test_equations_3_to_6() -> None:
    found = papers.equations(L=32, q=2, n=4096, r=16, r_out=2000, r_in=16)
    assert (found.lora, found.nora) == (8_388_608, 4_096_000)
    assert found.ratio == pytest.approx(found.lora / found.nora)
    assert found.approximate == pytest.approx(found.ratio)  # exact where r_in = r
    for wrong in ({"n": 0}, {"r": 5000}, {"r_in": 2001}, {"L": -3}):
        with pytest.raises(LabError):
            papers.equations(**{"L": 32, "q": 2, "n": 4096, "r": 16, "r_out": 2000, "r_in": 16, **wrong})
