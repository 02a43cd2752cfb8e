"""scikit-learn's digits: 1,797 handwritten digits of 8×8 pixels. The last fifth of each class is for testing."""

import csv
import gzip
from pathlib import Path
from typing import TYPE_CHECKING

from lab.datasets import ASSETS, Dataset, Listing, Picture, register

if TYPE_CHECKING:
    from PIL import Image

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _load(_root: Path) -> Listing:
    with gzip.open(ASSETS / "digits.csv.gz", "rt", newline="") as file:
        rows = [[int(float(value)) for value in row] for row in csv.reader(file)]

    def read(key: str) -> "Image.Image":
        from PIL import Image

        greys = bytes(255 - value * 255 // 16 for value in rows[int(key)][:64])  # dark ink on white
        return Image.frombytes("L", (8, 8), greys).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")

    train, test = [], []
    for label in range(10):
        group = [Picture(str(i), label) for i, row in enumerate(rows) if row[64] == label]
        cut = len(group) * 4 // 5
        train += group[:cut]
        test += group[cut:]
    return Listing(_WORDS, train, test, read)


register(
    Dataset(
        id="digits",
        name="Handwritten digits (embedded)",
        template='a photo of the number: "{}".',
        licence="CC BY 4.0, UCI Machine Learning Repository, doi 10.24432/C50P49",
        load=_load,
        summary="10 digits of 8×8 pixels, 1,797 pictures, as scikit-learn ships them.",
        flip=False,
        order=11,
    )
)
