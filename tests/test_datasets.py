"""Datasets that strangers bring, read or refused, and the draws made from any."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import datasets
from lab.clip import protocol
from lab.datasets import _upload, resolve
from lab.datasets._folder import Member, class_name, sort
from lab.errors import LabError
from tests.datasets_helpers import datasets_home, png  # noqa: F401 - datasets_home is a fixture

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220)}


def folder(root: Path, count=4, names=tuple(COLOURS), under="") -> Path:
    for c, name in enumerate(names):
        for i in range(count):
            path = root / under / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(list(COLOURS.values())[c % 3], i + 100 * len(under)))
    return root


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def files(count=4, names=tuple(COLOURS)) -> dict[str, bytes]:
    return {f"{n}/{i}.png": png(list(COLOURS.values())[c % 3], i) for c, n in enumerate(names) for i in range(count)}


def listing(path: Path, **options) -> datasets.Listing:
    return _upload.dataset(_upload.take(path, **options)).listing()


# -- what is read ---------------------------------------------------------------------------------------------------
def test_folder_and_zip_of_it_are_the_same_dataset(tmp_path):
    name = _upload.take(folder(tmp_path / "data"))
    assert name == _upload.take(packed(tmp_path / "data.zip", files()))
    made = resolve(name).listing()
    assert made.classes == ["blue", "green", "red"]
    assert made.counts() == [(2, 2)] * 3
    assert made.open(made.train[0].key).size == (20, 20)
    assert "half of each class" in made.notes[0]
    assert resolve(str(tmp_path / "data")).id == name


def test_given_split_is_kept_and_copies_across_it_are_counted(tmp_path):
    root = folder(tmp_path / "wrap" / "data", 3, under="train")
    folder(root, 2, under="Test")
    (root / "Test" / "red" / "copy.png").write_bytes((root / "train" / "red" / "0.png").read_bytes())
    made = listing(tmp_path / "wrap")
    assert made.counts() == [(3, 2), (3, 2), (3, 3)]
    assert made.duplicates == 1
    assert made.notes == ["1 of the 7 test pictures are exact copies of training pictures."]


def test_own_split_keeps_copies_on_one_side(tmp_path):
    contents = files(6)
    contents |= {f"red/copy{i}.png": contents["red/0.png"] for i in range(5)}
    made = listing(packed(tmp_path / "a.zip", contents))
    assert made.duplicates == 0
    assert "5 pictures are exact copies of others." in made.notes


def test_nested_hidden_and_other_files(tmp_path):
    contents = files() | {
        "red/more/deep.png": png(number=9),
        "__MACOSX/red/x.png": b"x",
        "red/.y.png": b"x",
        "red/notes.txt": b"x",
    }
    made = listing(packed(tmp_path / "a.zip", contents))
    assert made.counts()[2] == (3, 2) or made.counts()[2] == (2, 3)
    assert "1 files that are no pictures were left out." in made.notes


@pytest.mark.parametrize(
    "name", ["猫 и собака 🐱", "<img src=x onerror=alert(1)>", "a_b", "'; drop table runs; --", "É" * 90]
)
def test_class_names_of_any_script_or_with_markup_are_names(tmp_path, name):
    made = listing(packed(tmp_path / "a.zip", files(4, (name, "other"))))
    assert class_name(name) in made.classes
    kept = next((tmp_path / "home" / "datasets").iterdir())
    assert all(p.name == "dataset.json" or p.stem.isdecimal() for p in kept.iterdir())  # no name of theirs on the disk


def test_names_without_the_utf8_flag_are_read_as_utf8(tmp_path):
    path = packed(tmp_path / "a.zip", files(4, ("кот", "пёс")))
    raw = path.read_bytes()
    flag = (0x800).to_bytes(2, "little")
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # what a program that forgets the flag writes
        start = 0
        while (found := raw.find(mark, start)) >= 0:
            assert raw[found + at : found + at + 2] == flag
            raw = raw[: found + at] + b"\0\0" + raw[found + at + 2 :]
            start = found + 4
    path.write_bytes(raw)
    assert listing(path).classes == ["кот", "пёс"]


def test_large_pictures_are_kept_small(tmp_path):
    made = listing(packed(tmp_path / "a.zip", files() | {"red/big.png": png(side=900)}))
    sizes = {made.open(p.key).size for p in [*made.train, *made.test]}
    assert sizes == {(20, 20), (512, 512)}


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ({"../evil/a.png": b"x"}, "leads out of it"),
        ({"/etc/cron.d/a.png": b"x"}, "leads out of it"),
        ({"C:/a/b.png": b"x"}, "leads out of it"),
        ({"..\\evil\\a.png": b"x"}, "leads out of it"),
        ({"a/readme.txt": b"x"}, "No pictures were found"),
        (files(3, ("only",)), "Between 2 and 10000 classes are needed, 1 was found"),
        (files() | {"loose.png": png()}, "'loose.png' lies outside the class folders"),
        (files() | {"a_b/0.png": png(), "a b/0.png": png()}, "give the same class name"),
        ({f"{'d/' * 30}c{i}/a{'/b' * i}/x.png": png() for i in range(2)}, "more than 24 deep"),
        (files() | {"one/0.png": png()}, "Class 'one' has"),
    ],
)
def test_zip_that_does_not_do_is_refused_in_one_sentence(tmp_path, contents, sentence):
    with pytest.raises(LabError, match=sentence.replace("(", r"\(")) as refused:
        _upload.take(packed(tmp_path / "a.zip", contents))
    assert str(refused.value).count("\n") == 0
    left = list((tmp_path / "home" / "datasets").glob("*")) if (tmp_path / "home" / "datasets").exists() else []
    assert left == []
    assert not (tmp_path.parent / "evil").exists()


def test_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_MAX_DATASET_MB", "1")
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"c{i % 2}/{i}.png", b"\0" * 2**20)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(LabError, match="take 4 MB unpacked, at most 1 MB"):
        _upload.take(path)


def test_zip_whose_header_lies_about_sizes_is_damaged_not_unpacked(tmp_path):
    path = packed(tmp_path / "a.zip", files())
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (10).to_bytes(4, "little")  # the last member claims ten bytes
    path.write_bytes(raw)
    with pytest.raises(LabError, match="1 of the pictures cannot be read"):
        _upload.take(path)


def test_damaged_pictures_are_named_and_left_out_with_consent(tmp_path):
    path = packed(tmp_path / "a.zip", files() | {"red/broken.png": b"no picture", "blue/cut.png": png()[:60]})
    with pytest.raises(LabError, match=r"2 of the pictures cannot be read \('blue/cut.png', 'red/broken.png'\)"):
        _upload.take(path)
    made = listing(path, skip_damaged=True)
    assert made.notes[0] == "2 damaged pictures were left out: 'blue/cut.png', 'red/broken.png'."
    assert sum(map(sum, made.counts())) == 12


def test_encrypted_zip_link_and_no_zip(tmp_path):
    path = packed(tmp_path / "a.zip", files())
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(LabError, match="encrypted"):
        _upload.take(path)
    (tmp_path / "b.zip").write_bytes(b"hello")
    with pytest.raises(LabError, match="neither a folder nor a zip"):
        _upload.take(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name, content in files().items():
            archive.writestr(name, content)
        info = zipfile.ZipInfo("red/link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert "1 files that are no pictures were left out." in listing(tmp_path / "c.zip").notes


def test_link_out_of_a_folder_is_left_out(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(number=50))
    root = folder(tmp_path / "data")
    (root / "red" / "link.png").symlink_to(tmp_path / "secret.png")
    assert sum(map(sum, listing(root).counts())) == 12


def test_five_thousand_classes(tmp_path):
    members = [Member(Path(f"c{i:04d}/{j}.png"), 1, None) for i in range(5000) for j in range(2)]
    names, places = sort(members)
    assert len(names) == 5000
    assert places[-1] == ("", 4999)
    labels, keys = [p[1] for p in places], [str(m.path) for m in members]
    train, test = protocol.split(labels, keys, 5000)
    assert len(train) == len(test) == 5000


@pytest.mark.parametrize("name", ["upload:../../etc", "upload:" + "0" * 40, "upload:", "nothing-like-it", "/etc"])
def test_pages_cannot_name_folders_or_guess_uploads(name):
    with pytest.raises(LabError, match=r"not found|Unknown dataset"):
        resolve(name, local=False)


# -- the protocol ---------------------------------------------------------------------------------------------------
@given(st.integers(2, 5), st.integers(6, 12), st.integers(1, 5), st.integers(0, 99))
def test_draws_are_disjoint_nested_and_repeatable(classes, count, shots, seed):
    labels = [c for c in range(classes) for _ in range(count)]
    names = [str(c) for c in range(classes)]
    drawn = protocol.draw(labels, [], names, shots, seed)
    assert drawn == protocol.draw(labels, [], names, shots, seed)
    assert not set(drawn.train) & set(drawn.validation)
    assert sorted(labels[i] for i in drawn.train) == sorted(list(range(classes)) * shots)
    assert len(drawn.validation) == classes * min(shots, protocol.VALIDATION, count - shots)
    if shots + 1 < count:
        assert set(drawn.train) < set(protocol.draw(labels, [], names, shots + 1, seed).train)
    assert protocol.most_shots(labels, [], classes) == count - 1


def test_own_validation_pictures_are_used_and_all_training_pictures_may_be_shots():
    drawn = protocol.draw([0, 0, 1, 1], [0, 1, 0, 1], ["a", "b"], 2, 0)
    assert sorted(drawn.train) == [0, 1, 2, 3]
    assert drawn.own_validation
    assert sorted(drawn.validation) == [0, 1, 2, 3]


def test_class_with_fewer_pictures_than_shots_is_named():
    with pytest.raises(LabError, match="Class 'cat' has 3 pictures to train with; 4 shots and at least one validation"):
        protocol.draw([0] * 9 + [1] * 3, [], ["dog", "cat"], 4, 1)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30))
def test_split_does_not_depend_on_order_and_separates_contents(contents):
    keys = [str(c) for c in contents]
    train, test = protocol.split([0] * len(keys), keys, 1)
    assert sorted(train + test) == list(range(len(keys)))
    assert not {keys[i] for i in train} & {keys[i] for i in test}
    backwards = protocol.split([0] * len(keys), keys[::-1], 1)[1]
    assert sorted(keys[::-1][i] for i in backwards) == sorted(keys[i] for i in test)
