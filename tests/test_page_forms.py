"""The Subject tab's form: good input is a whole spec, bad input one clear sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab.errors import LabError
from lab.runs import Store
from lab.ui import examples, settings, setup, subject
from lab.ui.drafts import Drafts, checked
from tests.page_server import PICTURE, form, pictures, ticked


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pictures": []}, "Between 3 and 20 pictures"),
        ({"pictures": None}, "Between 3 and 20 pictures"),
        ({"pictures": [PICTURE]}, "1 given"),
        ({"pictures": [PICTURE] * 21}, "At most 20"),
        ({"pictures": "abc"}, "could not be read"),
        ({"pictures": [PICTURE | {"crop": [1, 0, 64]}] * 3}, "beyond the picture"),
        ({"pictures": [PICTURE | {"crop": [0, 0]}] * 3}, "left, top and size"),
        ({"pictures": [PICTURE | {"crop": [float("nan"), 0, 1]}] * 3}, "whole number"),
        ({"pictures": [PICTURE | {"caption": "x" * 301}] * 3}, "too long"),
        ({"class_word": ""}, "class word"),
        ({"class_word": "  \n "}, "class word"),
        ({"class_word": "x" * 500}, "class word is too long: 500"),
        ({"class_word": None}, "class word"),
        ({"trigger": "x" * 500}, "trigger word is too long"),
        ({"steps": 0}, "steps"),
        ({"steps": 1_000_000}, "steps"),
        ({"batch": -1}, "batch"),
        ({"seeds": "one"}, "Training seeds must be whole numbers"),
        ({"seeds": "1,1"}, "differ"),
        ({"sample_seeds": "-1"}, "sample_seeds"),
        ({"prompts": "x" * 501}, "prompt"),
        ({"base": "/etc"}, "Unknown base model"),
        ({"base": "owner/name"}, "Unknown base model"),
        ({"targets": "everything"}, "Unknown target"),
        ({"resolution": 63}, "multiple of 8"),
        ({"picker": ticked()}, "tick at least one"),
        ({"picker": None}, "tick at least one"),
        ({"picker": ticked("lorax")}, "Unknown method 'lorax'"),
        ({"picker": ticked("nora", nora={"r_inner": 0})}, "r_inner must be at least 1"),
        ({"picker": ticked("nora", nora={"r_inner": "many"})}, "r_inner must be a number"),
        ({"picker": ticked("nora", nora={"width": 1})}, "Unknown setting 'width'"),
        ({"picker": ticked("nora", nora={"r_inner": [1]})}, "must be a number or a short text"),
    ],
)
def test_bad_input_is_one_clear_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError) as problem:
        setup.spec_of(form(**given))
    told = str(problem.value)
    assert sentence in told
    assert len(told) < 250
    assert told.endswith((".", "?"))
    assert "Traceback" not in setup.summarise(form(**given))


def test_good_form_is_a_whole_spec() -> None:
    spec, kept = setup.spec_of(form(picker=ticked("nora", nora={"r_inner": "2"}), lr=0.01, snr_gamma=5))
    assert spec["methods"]["nora"]["r_inner"] == 2
    assert spec["lr"] == {"nora": 0.01}
    assert spec["snr_gamma"] == 5
    assert spec["captions"] == ["", "", ""]
    assert spec["crops"] == [[0, 0, 64]] * 3
    assert len(kept) == 3


def test_default_form_is_the_tasks_own_defaults() -> None:
    spec, _ = setup.spec_of(form())
    expected = settings.defaults(settings.DEFAULT_BASE)
    for name in ("steps", "batch", "seeds", "prompts", "lr", "budget", "snr_gamma", "resolution", "methods", "targets"):
        assert spec[name] == expected[name], name


def test_uploads_keep_what_is_good_and_say_what_is_not(tmp_path: Path, home: Path) -> None:
    pictures()[0].save(tmp_path / "fox.png")
    whole = (tmp_path / "fox.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "fox.txt").write_text("a fox on\nthe grass\n")
    (tmp_path / "owl.txt").write_text("an owl")
    Image.new("CMYK", (50, 40)).save(tmp_path / "print.jpg")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    kept, problems = setup.add_files(Store(home), "somebody", paths, [])
    assert [p["caption"] for p in kept] == ["a fox on the grass", ""]
    assert kept[1]["crop"] == [5, 0, 40]
    assert len(problems) == 3
    assert [any(name in p for p in problems) for name in ("cut.png", "words.png", "owl.txt")] == [True] * 3


def test_twenty_first_picture_is_left_out(tmp_path: Path, home: Path) -> None:
    pictures()[0].save(tmp_path / "a.png")
    now = [PICTURE | {"id": f"{i:024x}"} for i in range(20)]
    kept, problems = setup.add_files(Store(home), "somebody", [str(tmp_path / "a.png")], now)
    assert len(kept) == 20
    assert "at most 20" in problems[0]


def test_draft_comes_back(home: Path) -> None:
    drafts = Drafts(home, "erin")
    first = drafts.add(pictures()[0], "a caption")
    subject.remember(Store(home), "erin", form(pictures=[first, first]))
    assert drafts.load()["pictures"] == checked([first, first])
    assert drafts.load()["class_word"] == "fox"
    drafts.path(first["id"], ".png").unlink()
    assert drafts.load()["pictures"] == []
    assert Drafts(home, "frank").load() == {}


def test_waiting_pictures_are_bounded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.ui.drafts.KEPT", 4)
    drafts = Drafts(home, "grace")
    for _ in range(7):
        drafts.add(pictures()[0])
    assert len(list(drafts.folder.glob("*.png"))) == 4
    assert len(list(drafts.folder.glob("*.jpg"))) == 4


def test_every_example_subject_is_ready_to_train(home: Path) -> None:
    found = examples.examples()
    assert len(found) >= 6
    for id in found:
        kept, word = setup.use_example(Store(home), "heidi", id)
        spec, _ = setup.spec_of(form(pictures=kept, class_word=word))
        assert 4 <= spec["pictures"] <= 6
