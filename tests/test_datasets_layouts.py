"""The embedded datasets, and the field's benchmarks in their layouts on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from lab import datasets
from lab.clip import protocol
from lab.datasets import DATASETS, resolve
from lab.errors import LabError
from tests.datasets_helpers import datasets_home, png  # noqa: F401 - datasets_home is a fixture


def test_embedded_dataset_has_classes_pictures_authors_and_no_copies():
    made = resolve("").listing()
    assert len(made.classes) >= 10
    assert all(train + test >= 40 for train, test in made.counts())
    with (datasets.ASSETS / "openmoji" / "index.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.train) + len(made.test)
    assert all(row["author"] for row in rows)
    assert "CC BY-SA 4.0" in (datasets.ASSETS / "README.md").read_text()
    shown = {made.open(p.key).tobytes() for p in [*made.train, *made.test]}
    assert len(shown) == len(rows)
    assert protocol.most_shots([p.label for p in made.train], [], len(made.classes)) >= 20


def test_digits():
    made = resolve("digits").listing()
    assert len(made.train) + len(made.test) == 1797
    assert made.open("0").size == (64, 64)
    assert made.open("0").getpixel((0, 0)) == (255, 255, 255)
    assert not resolve("digits").flip


SPLIT_FILES = {
    "food101": ("food-101", "images", "Food101"), "pets": ("oxford_pets", "images", "OxfordPets"),
    "dtd": ("dtd", "images", "DescribableTextures"), "eurosat": ("eurosat", "2750", "EuroSAT"),
    "flowers102": ("oxford_flowers", "jpg", "OxfordFlowers"),
    "caltech101": ("caltech-101", "101_ObjectCategories", "Caltech101"), "sun397": ("sun397", "SUN397", "SUN397"),
    "cars": ("stanford_cars", "", "StanfordCars"), "ucf101": ("ucf101", "UCF-101-midframes", "UCF101"),
}  # fmt: skip


@pytest.mark.parametrize("id", SPLIT_FILES)
def test_coops_split_file_is_read(tmp_path, monkeypatch, id):
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    folder_, images, name = SPLIT_FILES[id]
    root = tmp_path / folder_
    split = {
        part: [[f"{c}/{part}.png", i, c] for i, c in enumerate(("banded", "zig_zag"))]
        for part in ("train", "val", "test")
    }
    for rows in split.values():
        for path, _, _ in rows:
            (root / images / path).parent.mkdir(parents=True, exist_ok=True)
            (root / images / path).write_bytes(png())
    (root / f"split_zhou_{name}.json").write_text(json.dumps(split))
    assert DATASETS[id].is_here()
    made = resolve(id).listing()
    assert made.classes == ["banded", "zig zag"]
    assert (len(made.train), len(made.validation), len(made.test)) == (2, 2, 2)
    assert made.open(made.test[1].key).size == (20, 20)


def test_cub_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    root = tmp_path / "CUB_200_2011"
    root.mkdir()
    (root / "classes.txt").write_text("1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    (root / "images.txt").write_text("1 001.B/a.jpg\n2 001.B/b.jpg\n3 002.L/c.jpg\n4 002.L/d.jpg\n")
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")
    made = resolve("cub200").listing()
    assert made.classes == ["Black footed Albatross", "Laysan Albatross"]
    assert [p.key for p in made.test] == ["001.B/b.jpg", "002.L/d.jpg"]


def test_aircraft_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    root = tmp_path / "fgvc_aircraft"
    root.mkdir()
    (root / "variants.txt").write_text("707-320\nA 320\n")
    for part in ("train", "val", "test"):
        (root / f"images_variant_{part}.txt").write_text("1 707-320\n2 A 320\n")
    made = resolve("aircraft").listing()
    assert made.classes == ["707-320", "A 320"]
    assert made.test[1] == datasets.Picture("2.jpg", 1)


def test_torchvision_sets_are_read_with_their_own_names(tmp_path, monkeypatch):
    """EuroSAT has no split: the lab's is drawn, and a note says that figures do not compare."""
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    for name in ("AnnualCrop", "Forest"):
        for i in range(4):
            path = tmp_path / "eurosat" / "2750" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, 0, 0)).save(path)
    made = resolve("eurosat").listing()
    assert made.classes == ["Annual Crop Land", "Forest"]
    assert made.counts() == [(2, 2), (2, 2)]
    assert made.open(made.test[0].key).size == (16, 16)
    assert "do not compare" in made.notes[0]


def jpeg(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(path)


def test_food_and_pets_in_torchvisions_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    food, pets = tmp_path / "food-101", tmp_path / "oxford-iiit-pet"
    for part, start in (("train", 0), ("test", 2)):
        names = {c: [f"{c}/{i}" for i in range(start, start + 2)] for c in ("apple_pie", "baklava")}
        (food / "meta").mkdir(parents=True, exist_ok=True)
        (food / "meta" / f"{part}.json").write_text(json.dumps(names))
        for path in [path for paths in names.values() for path in paths]:
            jpeg(food / "images" / f"{path}.jpg")
    (pets / "annotations").mkdir(parents=True)
    for part, start in (("trainval", 0), ("test", 2)):
        rows = [f"{n}_{i} {c} 1 1" for c, n in ((1, "Abyssinian"), (2, "american_bulldog")) for i in (start, start + 1)]
        (pets / "annotations" / f"{part}.txt").write_text("\n".join(rows))
        for row in rows:
            jpeg(pets / "images" / f"{row.split()[0]}.jpg")
    for id, classes in (("food101", ["apple pie", "baklava"]), ("pets", ["abyssinian", "american bulldog"])):
        assert DATASETS[id].is_here()
        made = resolve(id).listing()
        assert made.classes == classes
        assert made.counts() == [(2, 2), (2, 2)]
        assert made.open(made.test[3].key).size == (16, 16)


def test_sun_and_caltech_without_a_split_file(tmp_path, monkeypatch):
    """SUN397 names places as CoOp does; Caltech-101 loses the two classes that the field leaves out."""
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    sun = tmp_path / "SUN397"
    for name in ("a/abbey", "a/apartment_building/outdoor"):
        for i in range(4):
            jpeg(sun / name / f"sun_{name[2]}{name[-1]}{i}.jpg", i)
    (sun / "ClassName.txt").write_text("/a/abbey\n/a/apartment_building/outdoor\n")
    caltech = tmp_path / "caltech101" / "101_ObjectCategories"
    for name in ("BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "water_lilly"):
        for i in range(4):
            jpeg(caltech / name / f"image_{i:04d}.jpg", i)
    found = {id: resolve(id).listing() for id in ("sun397", "caltech101")}
    assert found["sun397"].classes == ["abbey", "outdoor apartment building"]
    assert found["caltech101"].classes == ["face", "airplane", "water lilly"]
    for id, made in found.items():
        assert DATASETS[id].is_here()
        assert set(made.counts()) == {(2, 2)}
        assert "do not compare" in made.notes[0]
        assert made.open(made.test[0].key).size == (16, 16)


@pytest.mark.parametrize(("id", "cls"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_in_torchvisions_layout(tmp_path, monkeypatch, id, cls):
    """Files of torchvision's layout, whose sums are then not compared: they are not the real ones."""
    import pickle

    import numpy as np
    import torchvision

    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    made = getattr(torchvision.datasets, cls)
    labels = "labels" if id == "cifar10" else "fine_labels"
    root = tmp_path / made.base_folder
    root.mkdir()
    for name, _ in [*made.train_list, *made.test_list]:
        (root / name).write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), labels: [0, 1]}))
    (root / made.meta["filename"]).write_bytes(pickle.dumps({made.meta["key"]: ["aquarium_fish", "bear"]}))
    monkeypatch.setattr(made, "download", lambda _self: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(LabError, match="is not on this machine and could not be downloaded"):
        resolve(id).listing()  # sums differ: never unpickled
    monkeypatch.setattr(made, "_check_integrity", lambda _self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    listing_ = resolve(id).listing()
    assert listing_.classes == ["aquarium fish", "bear"]
    assert listing_.open(listing_.test[0].key).size == (32, 32)


def test_missing_benchmark_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    for id in ("cars", "cub200"):
        assert not DATASETS[id].is_here()
        with pytest.raises(LabError, match="not on this machine"):
            resolve(id).listing()
