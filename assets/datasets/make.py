"""Make the embedded few-shot dataset from OpenMoji.

    npm pack openmoji@17.0.0 && tar xzf openmoji-17.0.0.tgz
    python assets/datasets/make.py package assets/datasets/openmoji

needs `rsvg-convert` (Debian: librsvg2-bin) and Pillow. Writes `{train,test}/CLASS/HEXCODE.png`, 96×96 on white,
and `index.csv` (split, class, file, name, author: the credits that the licence, CC BY-SA 4.0, asks for). The
split is drawn once, here: 24 pictures a class to train and validate on, 20 to test on.
"""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path

from PIL import Image

SIZE, TRAIN, TEST = 96, 24, 20

# Class -> OpenMoji subgroups ("group/subgroup" where the subgroup's name is not unique), then single pictures that
# belong to it and pictures of those subgroups that do not, by OpenMoji's annotation.
CLASSES: dict[str, tuple[str, str, str]] = {
    "face": (
        "face-smiling face-affection face-tongue face-neutral-skeptical face-sleepy face-unwell face-concerned",
        "",
        "",
    ),
    "mammal": ("animal-mammal", "", "paw prints"),
    "bird fish or insect": ("animal-bird animal-marine animal-bug", "", "feather; wing; spider web"),
    "fruit or vegetable": (
        "food-fruit food-vegetable",
        "pomegranate; half orange fruit; champignon brown; champignon white; jack-o-lantern",
        "",
    ),
    "food": ("food-prepared food-asian food-sweet", "maultasche; lentils with spaetzle; cake", ""),
    "vehicle": (
        "transport-ground transport-water transport-air",
        "autonomous car; space shuttle",
        "station; bus stop; motorway; railway track; oil drum; fuel pump; wheel; police car light; stop sign; "
        "horizontal traffic light; vertical traffic light; construction; anchor; ring buoy; seat; roller skate; "
        "airplane departure; airplane arrival",
    ),
    "building": (
        "place-building place-religious",
        "tent; circus tent; town; eiffel tower; parking garage; schwäbisch gmünd fünfknopfturm; "
        "schwäbisch gmünd ratshaus; stuttgart fernsehturm; great pyramid of giza; lighthouse of alexandria; "
        "mausoleum at halicarnassus; temple of artemis at ephesus; exhaust gases factory; nuclear power plant; "
        "nuclear power plant ruin; polar research station; hanging gardens of babylon",
        "brick; rock; wood",
    ),
    "clothing": ("clothing", "gardening gloves; motorbike helmet; reusable bag", "gem stone"),
    "sky or weather": (
        "sky-weather",
        "foggy; night with stars; sunrise; black hole; foggy mountain; full moon",
        "umbrella; closed umbrella; umbrella on ground; thermometer",
    ),
    "hand": (
        "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands hand-prop",
        "ai hand; flexed biceps",
        "",
    ),
    "tool": (
        "tool",
        "lawn mower; wheelbarrow; spade; trowel; saw; forceps; bandage scissors; swab pliers; scissors; pushpin; "
        "straight ruler; paperclip; plunger; razor; broom; toothbrush; safety pin; mouse trap; bucket; kitchen knife; "
        "microscope; telescope",
        "link; broken chain; chains; bomb; shield",
    ),
    "electronic device": (
        "computer phone",
        "television; camera; camera with flash; video camera; movie camera; film projector; flashlight; tablet; gps; "
        "smartwatch; keyboard; drone; arduino; raspberry pi; virtual reality; washing machine; ibeacon; led; motor; "
        "espresso machine; radio; headphone; studio microphone; joystick; video game; electric coffee percolator; "
        "surveillance; switch; geiger counter; ct scan",
        "abacus; videocassette",
    ),
}


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(";") if name.strip()}


def chosen(table: list[dict]) -> dict[str, list[dict]]:
    """The pictures of each class: one a concept, no skin tones, drawn by a fixed seed."""
    rows = [row for row in table if not row["skintone"]]
    result = {}
    for name, (subgroups, more, less) in CLASSES.items():
        wanted, added, removed = set(subgroups.split()), _names(more), _names(less)
        absent = (added | removed) - {row["annotation"] for row in rows}
        if absent:
            sys.exit(f"OpenMoji has no picture called {', '.join(sorted(absent))}.")
        by_name = {
            row["annotation"]: row
            for row in rows
            if (row["subgroups"] in wanted and row["annotation"] not in removed) or row["annotation"] in added
        }
        picked = sorted(by_name.values(), key=lambda row: row["hexcode"])
        random.Random(f"openmoji/{name}").shuffle(picked)
        if len(picked) < TRAIN + TEST:
            sys.exit(f"Class '{name}' has {len(picked)} pictures, {TRAIN + TEST} are needed.")
        result[name] = picked[: TRAIN + TEST]
    return result


def render(svg: Path, target: Path) -> None:
    """One drawing as a palette PNG on white."""
    png = subprocess.run(
        ["rsvg-convert", "-w", str(SIZE), "-h", str(SIZE), "-b", "white", str(svg)], check=True, capture_output=True
    ).stdout
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(32, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


def main(package: Path, out: Path) -> None:
    table = json.loads((package / "data" / "openmoji.json").read_text())
    with (out.mkdir(parents=True, exist_ok=True) or out / "index.csv").open("w", newline="") as file:
        index = csv.writer(file)
        index.writerow(["split", "class", "file", "name", "author"])
        for name, rows in chosen(table).items():
            for i, row in enumerate(rows):
                split = "train" if i < TRAIN else "test"
                target = out / split / name / f"{row['hexcode']}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                render(package / "color" / "svg" / f"{row['hexcode']}.svg", target)
                index.writerow([split, name, target.name, row["annotation"], row["openmoji_author"]])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
