"""Datasets of labelled pictures for the few-shot task. ADD A DATASET: one file in this folder that registers a row.

    from lab.datasets import Dataset, Listing, register
    register(Dataset(id="mine", name="Mine", template="a photo of a {}.", licence="…", load=read_mine))

`load(root)` gets the folder that datasets lie in (LAB_DATA) and returns a `Listing`. `resolve` also takes an upload
("upload:…"), and on the command line a folder with one sub-folder a class, or a zip of one. No torch here.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabError
from lab.registry import Registry, unknown

if TYPE_CHECKING:
    from PIL import Image

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "datasets"
EMBEDDED = "openmoji"
MAX_CLASSES, MAX_PICTURES = 10_000, 200_000


@dataclass(frozen=True)
class Picture:
    """key: the picture's name inside its dataset (a relative path, or a number); label: index of its class."""

    key: str
    label: int


@dataclass
class Listing:
    """A dataset's pictures, unread. `open(key)` gives one as RGB.

    validation: empty where the dataset has none of its own. notes: what was found on reading, a sentence each.
    """

    classes: list[str]
    train: list[Picture]
    test: list[Picture]
    open: Callable[[str], Image.Image]
    validation: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    duplicates: int = 0  # pictures of the test set whose exact content is in the training set too

    @property
    def fingerprint(self) -> str:
        """Names what is in it: classes' order, pictures, split. Caches of features are filed under it."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.train, self.validation, self.test):
            digest.update("".join(f"\0{p.key}\1{p.label}" for p in part).encode() + b"\2")
        return digest.hexdigest()[:32]

    def counts(self) -> list[tuple[int, int]]:
        """(training and validation pictures, test pictures) of each class."""
        train = Counter(p.label for p in [*self.train, *self.validation])
        test = Counter(p.label for p in self.test)
        return [(train[i], test[i]) for i in range(len(self.classes))]


@dataclass(frozen=True)
class Dataset:
    id: str
    name: str
    template: str  # "{}" stands for the class
    licence: str
    load: Callable[[Path], Listing]
    folder: str = ""  # under LAB_DATA; empty: comes with the lab
    elsewhere: str = ""  # another folder under LAB_DATA that it may lie in
    summary: str = ""
    flip: bool = True  # whether a mirror image is still of its class
    order: int = 100

    def listing(self) -> Listing:
        """Its pictures. Raises LabError where it is not on this machine."""
        listing = self.load(data_root())
        check(listing)
        return listing

    def is_here(self) -> bool:
        """Whether it can be used without downloading anything."""
        places = [place for place in (self.folder, self.elsewhere) if place]
        return not self.folder or any((data_root() / place).is_dir() for place in places)


DATASETS: Registry[Dataset] = Registry("dataset", "lab.datasets")
register = DATASETS.register


def home() -> Path:
    """Where uploads and caches lie: LAB_HOME."""
    from lab.runs import default_home

    return default_home()


def data_root() -> Path:
    """The folder of downloaded datasets: LAB_DATA, or `data` under LAB_HOME."""
    given = os.environ.get("LAB_DATA", "").strip()
    return Path(given).expanduser() if given else home() / "data"


def check(listing: Listing) -> Listing:
    """Raises LabError when nothing can be learned from it: fewer than two classes, or a class without pictures."""
    if len(listing.classes) < 2:
        only = f" ('{listing.classes[0][:60]}')" if listing.classes else ""
        raise LabError(
            f"At least two classes are needed, {len(listing.classes)} found{only}: make one sub-folder for each class."
        )
    if len(listing.classes) > MAX_CLASSES:
        raise LabError(f"{len(listing.classes)} classes are too many: at most {MAX_CLASSES}; leave some out.")
    for name, (train, test) in zip(listing.classes, listing.counts(), strict=True):
        if not train or not test:
            raise LabError(
                f"Class '{name[:60]}' has {train} pictures to train with and {test} to test on: it needs at least one "
                "of each; add pictures, or leave the class out."
            )
    return listing


def resolve(name: str, *, local: bool = True) -> Dataset:
    """The dataset with this id, an upload, or (only with `local`: requests from a page may not) a folder or zip.

    "" and "embedded" stand for the one that comes with the lab. Raises LabError for anything else.
    """
    from lab.datasets import _upload

    if name in ("", "embedded"):
        name = EMBEDDED
    if name.startswith(_upload.PREFIX):
        return _upload.dataset(name)
    if name in DATASETS:
        return DATASETS[name]
    path = Path(name).expanduser()
    if local and (path.is_dir() or path.is_file()):
        return _upload.dataset(_upload.take(path))
    raise unknown("dataset", name, DATASETS.ids())


__all__ = ["ASSETS", "DATASETS", "EMBEDDED", "Dataset", "Listing", "Picture", "check", "register", "resolve"]
