"""The field's benchmarks, read from their usual layout under LAB_DATA, or through torchvision (which downloads them).

Where CoOp's split file (`split_zhou_….json`, https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md) lies in the
dataset's folder, its split and class names are used: then figures compare with the papers'. Otherwise torchvision's
own split is, and where that has none (EuroSAT, Caltech-101, SUN397), the lab's (`lab.clip.protocol.split`).
Templates are CoOp's. torchvision's CIFAR files are pickles: it compares their MD5 sums before it opens one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.clip import protocol
from lab.datasets import Dataset, Listing, Picture, register
from lab.errors import LabError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Benchmark:
    """folder, images, split_file: CoOp's layout. torchvision: class, attribute of its labels, attribute of its class
    names, and the arguments that give each part ("all": it has no split)."""

    folder: str
    images: str = ""
    split_file: str = ""
    torchvision: str = ""
    labels: str = "_labels"
    names: str = "classes"
    parts: tuple[tuple[str, dict[str, Any]], ...] = ()
    rename: Callable[[str], str] = str  # torchvision's name of a class → the field's

    def load(self, root: Path) -> Listing:
        folder = root / self.folder
        if self.split_file and (folder / self.split_file).is_file():
            return _zhou(folder / self.split_file, folder / self.images)
        if not self.torchvision:
            raise LabError(
                f"This dataset is not on this machine: put it, with {self.split_file}, into {self.folder}/ under LAB_DATA."
            )
        return self._from_torchvision(root)

    def _from_torchvision(self, root: Path) -> Listing:
        sets = {part: self._part(root, arguments) for part, arguments in self.parts}
        every = [str(name) for name in getattr(next(iter(sets.values())), self.names)]
        pictures = {
            part: [Picture(f"{part}/{i}", _label(given)) for i, given in enumerate(getattr(data, self.labels))]
            for part, data in sets.items()
        }
        names = [self.rename(name).replace("_", " ") for name in every]

        def read(key: str) -> Image.Image:
            part, _, i = key.partition("/")
            return sets[part][int(i)][0].convert("RGB")

        if "all" in pictures:
            every_one = pictures["all"]
            files = getattr(sets["all"], "_image_files", None) or [path for path, _ in sets["all"].samples]
            keys = [Path(file).name for file in files]  # the order of files differs from machine to machine
            train, test = protocol.split([p.label for p in every_one], keys, len(names))
            return Listing(names, [every_one[i] for i in train], [every_one[i] for i in test], read, notes=[_NO_SPLIT])
        return Listing(names, pictures["train"], pictures["test"], read, pictures.get("validation", []))

    def _part(self, root: Path, arguments: dict[str, Any]) -> Any:
        import torchvision

        made: Callable[..., Any] = getattr(torchvision.datasets, self.torchvision)
        try:
            try:
                return made(str(root), download=False, **arguments)
            except (RuntimeError, OSError):
                return made(str(root), download=True, **arguments)
        except Exception as error:
            what = f"the package {error.name} is missing" if isinstance(error, ImportError) else type(error).__name__
            raise LabError(
                f"{self.torchvision} is not on this machine and could not be downloaded ({what}): put it where "
                "torchvision looks, under LAB_DATA, or set LAB_DATA to where it is."
            ) from error


def _label(given: Any) -> int:
    """A label, or the (path, label) that Stanford Cars has."""
    return int(given[1] if isinstance(given, tuple) else given)


def _place_first(name: str) -> str:
    """SUN397: "apartment_building/outdoor" → "outdoor apartment building", as CoOp names it."""
    return " ".join(reversed(name.split("/")))


def _year_first(name: str) -> str:
    """Stanford Cars: "Audi S4 Sedan 2012" → "2012 Audi S4 Sedan", as CoOp names it."""
    words = name.split(" ")
    return " ".join([words[-1], *words[:-1]])


_LAND = {
    "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings", "Pasture": "Pasture Land", "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings", "SeaLake": "Sea or Lake",
}  # fmt: skip
_NO_SPLIT = "No split file was at hand, so half of each class, drawn once, is kept for testing: figures do not compare with papers'."


def _zhou(file: Path, images: Path) -> Listing:
    """CoOp's split file: {"train" | "val" | "test": [[path, label, class name], …]}."""
    parts = json.loads(file.read_text())
    names = {int(label): str(name) for rows in parts.values() for _, label, name in rows}
    order = sorted(names)
    found = {part: [Picture(path, order.index(int(label))) for path, label, _ in parts[part]] for part in parts}
    return _listing([names[i] for i in order], found["train"], found["test"], images, found.get("val", []))


def _listing(
    names: Sequence[str], train: list[Picture], test: list[Picture], images: Path, validation: list[Picture]
) -> Listing:
    def read(key: str) -> Image.Image:
        from lab import uploads

        return uploads.decode(images / key)

    return Listing([name.replace("_", " ") for name in names], train, test, read, validation)


def _caltech(root: Path) -> Listing:
    """Caltech-101 by CoOp's split file, or its folders alone, without the two that the field leaves out. Read without
    torchvision, whose reader wants scipy for annotations that nobody needs here."""
    coop = Benchmark("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json")
    if (root / coop.folder / coop.split_file).is_file():
        return coop.load(root)
    places = [root / name / coop.images for name in ("caltech-101", "caltech101")]
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise LabError(f"Caltech-101 is not on this machine: put {coop.images} into caltech-101/ under LAB_DATA.")
    names = sorted(p.name for p in images.iterdir() if p.is_dir() and p.name not in ("BACKGROUND_Google", "Faces_easy"))
    keys = [(f"{name}/{p.name}", i) for i, name in enumerate(names) for p in sorted((images / name).glob("*.jpg"))]
    train, test = protocol.split([label for _, label in keys], [key for key, _ in keys], len(names))
    parts = [[Picture(*keys[i]) for i in part] for part in (train, test)]
    singular = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
    made = _listing([singular.get(name, name) for name in names], parts[0], parts[1], images, [])
    made.notes.append(_NO_SPLIT)
    return made


def _aircraft(root: Path) -> Listing:
    """FGVC-Aircraft by variant: images_variant_{train,val,test}.txt, as CoOp reads it."""
    folder = root / "fgvc_aircraft"
    if not (folder / "variants.txt").is_file():
        splits = (("train", {"split": "train"}), ("validation", {"split": "val"}), ("test", {"split": "test"}))
        return Benchmark("", torchvision="FGVCAircraft", parts=splits).load(root)
    names = [line.strip() for line in (folder / "variants.txt").read_text().splitlines() if line.strip()]

    def part(split: str) -> list[Picture]:
        lines = (folder / f"images_variant_{split}.txt").read_text().splitlines()
        pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
        return [Picture(f"{image}.jpg", names.index(name)) for image, name in pairs]

    return _listing(names, part("train"), part("test"), folder / "images", part("val"))


def _cub(root: Path) -> Listing:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt."""
    folder = root / "CUB_200_2011"
    if not (folder / "images.txt").is_file():
        raise LabError("CUB-200 is not on this machine: put its folder CUB_200_2011 under LAB_DATA.")

    def table(name: str) -> dict[str, str]:
        return dict(line.split(" ", 1) for line in (folder / name).read_text().splitlines() if line.strip())

    names = [
        name.strip().split(".", 1)[-1] for _, name in sorted(table("classes.txt").items(), key=lambda c: int(c[0]))
    ]
    paths, labels, training = table("images.txt"), table("image_class_labels.txt"), table("train_test_split.txt")
    parts: dict[str, list[Picture]] = {"0": [], "1": []}
    for id, path in paths.items():
        parts[training[id].strip()].append(Picture(path.strip(), int(labels[id]) - 1))
    return _listing(names, parts["1"], parts["0"], folder / "images", [])


_TWO = (("train", {"split": "train"}), ("test", {"split": "test"}))
_THREE = (("train", {"split": "train"}), ("validation", {"split": "val"}), ("test", {"split": "test"}))
_CIFAR = (("train", {"train": True}), ("test", {"train": False}))
_ALL = (("all", {}),)

# id, name, template, load, CoOp's folder, torchvision's where it is another
_ROWS: list[tuple[str, str, str, Callable[[Path], Listing], str, str]] = [
    ("food101", "Food-101", "a photo of {}, a type of food.",
     Benchmark("food-101", "images", "split_zhou_Food101.json", "Food101", parts=_TWO).load, "food-101", ""),
    ("pets", "Oxford-IIIT Pets", "a photo of a {}, a type of pet.",
     Benchmark("oxford_pets", "images", "split_zhou_OxfordPets.json", "OxfordIIITPet",
               parts=(("train", {"split": "trainval"}), ("test", {"split": "test"})), rename=str.lower).load,
     "oxford_pets", "oxford-iiit-pet"),
    ("dtd", "Describable Textures", "{} texture.",
     Benchmark("dtd", "images", "split_zhou_DescribableTextures.json", "DTD", parts=_THREE).load, "dtd", ""),
    ("eurosat", "EuroSAT", "a centered satellite photo of {}.",
     Benchmark("eurosat", "2750", "split_zhou_EuroSAT.json", "EuroSAT", "targets", parts=_ALL,
               rename=lambda name: _LAND.get(name, name)).load, "eurosat", ""),
    ("flowers102", "Flowers-102", "a photo of a {}, a type of flower.",
     Benchmark("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "Flowers102", parts=_THREE).load,
     "oxford_flowers", "flowers-102"),
    ("aircraft", "FGVC-Aircraft", "a photo of a {}, a type of aircraft.", _aircraft, "fgvc_aircraft",
     "fgvc-aircraft-2013b"),
    ("caltech101", "Caltech-101", "a photo of a {}.", _caltech, "caltech-101", "caltech101"),
    ("sun397", "SUN397", "a photo of a {}.",
     Benchmark("sun397", "SUN397", "split_zhou_SUN397.json", "SUN397", parts=_ALL, rename=_place_first).load, "sun397",
     "SUN397"),
    ("cars", "Stanford Cars", "a photo of a {}.",
     Benchmark("stanford_cars", "", "split_zhou_StanfordCars.json", "StanfordCars", "_samples", parts=_TWO,
               rename=_year_first).load, "stanford_cars", ""),
    ("ucf101", "UCF-101 (middle frames)", "a photo of a person doing {}.",
     Benchmark("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json").load, "ucf101", ""),
    ("cifar10", "CIFAR-10", "a photo of a {}.",
     Benchmark("", torchvision="CIFAR10", labels="targets", parts=_CIFAR).load, "cifar-10-batches-py", ""),
    ("cifar100", "CIFAR-100", "a photo of a {}.",
     Benchmark("", torchvision="CIFAR100", labels="targets", parts=_CIFAR).load, "cifar-100-python", ""),
    ("cub200", "CUB-200", "a photo of a {}, a type of bird.", _cub, "CUB_200_2011", ""),
]  # fmt: skip

for _order, (_id, _name, _template, _load, _folder, _other) in enumerate(_ROWS):
    register(Dataset(_id, _name, _template, "see its authors' page", _load, _folder, _other, order=30 + _order))
