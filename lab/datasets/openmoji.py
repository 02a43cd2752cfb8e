"""The embedded dataset: OpenMoji drawings by category, a style that the embedded models have not seen."""

import csv
from pathlib import Path

from lab.datasets import ASSETS, EMBEDDED, Dataset, Listing, Picture, register


def _load(_root: Path) -> Listing:
    from lab import uploads

    folder = ASSETS / "openmoji"
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["class"] for row in rows})
    parts = {
        split: [
            Picture(f"{split}/{row['class']}/{row['file']}", classes.index(row["class"]))
            for row in rows
            if row["split"] == split
        ]
        for split in ("train", "test")
    }
    return Listing(classes, parts["train"], parts["test"], lambda key: uploads.decode(folder / key))


register(
    Dataset(
        id=EMBEDDED,
        name="OpenMoji by category (embedded)",
        template="an emoji of a {}",
        licence="CC BY-SA 4.0, openmoji.org; authors in assets/datasets/openmoji/index.csv",
        load=_load,
        summary="12 categories × 44 drawings in a style that the embedded models have not seen.",
        order=10,
    )
)
