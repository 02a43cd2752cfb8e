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
    drop: tuple[str, ...] = ()  # classes that the field leaves out

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
        kept = [name for name in every if name not in self.drop]
        number = {i: kept.index(name) for i, name in enumerate(every) if name in kept}
        pictures = {
            part: [
                Picture(f"{part}/{i}", number[int(label)])
                for i, label in enumerate(getattr(data, self.labels))
                if int(label) in number
            ]
            for part, data in sets.items()
        }
        names = [name.replace("_", " ") for name in kept]

        def read(key: str) -> Image.Image:
            part, _, i = key.partition("/")
            return sets[part][int(i)][0].convert("RGB")

        if "all" in pictures:
            every_one = pictures["all"]
            train, test = protocol.split([p.label for p in every_one], [p.key for p in every_one], len(names))
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

_ROWS: list[tuple[str, str, str, Callable[[Path], Listing], str]] = [
    ("food101", "Food-101", "a photo of {}, a type of food.",
     Benchmark("food-101", "images", "split_zhou_Food101.json", "Food101", parts=_TWO).load, "food-101"),
    ("pets", "Oxford-IIIT Pets", "a photo of a {}, a type of pet.",
     Benchmark("oxford_pets", "images", "split_zhou_OxfordPets.json", "OxfordIIITPet",
               parts=(("train", {"split": "trainval"}), ("test", {"split": "test"}))).load, "oxford_pets"),
    ("dtd", "Describable Textures", "{} texture.",
     Benchmark("dtd", "images", "split_zhou_DescribableTextures.json", "DTD", parts=_THREE).load, "dtd"),
    ("eurosat", "EuroSAT", "a centered satellite photo of {}.",
     Benchmark("eurosat", "2750", "split_zhou_EuroSAT.json", "EuroSAT", "targets", parts=_ALL).load, "eurosat"),
    ("flowers102", "Flowers-102", "a photo of a {}, a type of flower.",
     Benchmark("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "Flowers102", parts=_THREE).load,
     "oxford_flowers"),
    ("aircraft", "FGVC-Aircraft", "a photo of a {}, a type of aircraft.", _aircraft, "fgvc_aircraft"),
    ("caltech101", "Caltech-101", "a photo of a {}.",
     Benchmark("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "Caltech101", "y", "categories",
               _ALL, ("BACKGROUND_Google", "Faces_easy")).load, "caltech-101"),
    ("sun397", "SUN397", "a photo of a {}.",
     Benchmark("sun397", "SUN397", "split_zhou_SUN397.json", "SUN397", parts=_ALL).load, "sun397"),
    ("cars", "Stanford Cars", "a photo of a {}.",
     Benchmark("stanford_cars", "", "split_zhou_StanfordCars.json").load, "stanford_cars"),
    ("ucf101", "UCF-101 (middle frames)", "a photo of a person doing {}.",
     Benchmark("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json").load, "ucf101"),
    ("cifar10", "CIFAR-10", "a photo of a {}.",
     Benchmark("", torchvision="CIFAR10", labels="targets", parts=_CIFAR).load, "cifar-10-batches-py"),
    ("cifar100", "CIFAR-100", "a photo of a {}.",
     Benchmark("", torchvision="CIFAR100", labels="targets", parts=_CIFAR).load, "cifar-100-python"),
    ("cub200", "CUB-200", "a photo of a {}, a type of bird.", _cub, "CUB_200_2011"),
]  # fmt: skip

for _order, (_id, _name, _template, _load, _folder) in enumerate(_ROWS):
    register(Dataset(_id, _name, _template, "see its authors' page", _load, _folder, order=30 + _order))
