"""Scores: by hand on made-up embeddings, and the embedded scorer on real pictures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from lab import metrics
from lab.bases import ASSETS
from lab.errors import LabError

DIRECTIONS = {"red": (1.0, 0.0), "green": (0.0, 1.0), "both": (0.6, 0.8)}


class Fake:
    """Embeds a picture or a text by its colour's name."""

    name = "fake"

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        names = {(255, 0, 0): "red", (0, 128, 0): "green", (255, 255, 0): "both"}
        return torch.tensor([DIRECTIONS[names[p.getpixel((0, 0))]] for p in pictures])  # type: ignore[index]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([DIRECTIONS[t] for t in texts])


RED, GREEN, BOTH = (Image.new("RGB", (2, 2), colour) for colour in ("red", "green", "yellow"))


def test_scores_by_hand() -> None:
    scored = metrics.scores(Fake(), [RED, BOTH], ["green", "red"], [RED, GREEN])
    assert scored["clip_t_each"] == pytest.approx([0.0, 0.6])
    assert scored["clip_t"] == pytest.approx(0.3)
    assert scored["clip_i_each"] == pytest.approx([0.5, 0.7])  # (1 + 0)/2 and (0.6 + 0.8)/2
    assert scored["clip_i"] == pytest.approx(0.6)


def test_drift_by_hand() -> None:
    assert metrics.drift(Fake(), [RED, GREEN], [RED, GREEN]) == pytest.approx(0.0)
    assert metrics.drift(Fake(), [RED, GREEN], [GREEN, BOTH]) == pytest.approx((1.0 + 0.2) / 2 / 2)


def test_the_embedded_scorer_sees_colours() -> None:
    scorer = metrics.scorer(str(ASSETS / "tiny-clip"))
    pictures = [Image.new("RGB", (100, 80), colour) for colour in ("red", "blue", "green")]
    seen, read = scorer.images(pictures), scorer.texts([f"a dog on a {c} background" for c in ("red", "blue", "green")])
    assert seen.shape == read.shape
    assert torch.allclose(seen.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(read.norm(dim=1), torch.ones(3), atol=1e-5)
    assert (seen @ read.T).argmax(dim=1).tolist() == [0, 1, 2]
    assert metrics.scorer(str(ASSETS / "tiny-clip")) is scorer


def test_a_scorer_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(LabError) as caught:
        metrics.scorer("no-such-model")
    assert str(caught.value).startswith("The model that scores pictures, 'no-such-model', could not be loaded: ")
    assert len(str(caught.value)) < 300
