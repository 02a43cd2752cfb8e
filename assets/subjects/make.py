"""Make the example subjects: `python assets/subjects/make.py`, from the repository's root.

Each is one of the pictures that no training stage of the embedded base has seen (lab/pretrain/concepts.py), placed on
five backgrounds, larger, smaller, turned a little, those that look ahead also mirrored: what somebody's five photographs of one thing would be. The
pictures are 256 pixels wide, so that they are pleasant to look at; training reduces them to the base's resolution.
The backgrounds are the base's own scenes (64 pixels, enlarged smoothly). The scenes of the default prompts (snow,
beach, night, sea) are left out: there, the subject is new to every method.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

from lab.device import generator
from lab.pretrain.concepts import PLACES
from lab.pretrain.scenes import backgrounds
from lab.pretrain.sprites import PACKAGES, archive

SIDE = 256
HERE = Path(__file__).parent
# id: (class word, file in the package, colours behind it)
SUBJECTS = {
    "fox": ("fox", "1f98a", ("purple", "blue")),
    "penguin": ("penguin", "1f427", ("yellow", "pink")),
    "robot": ("robot", "1f916", ("green", "orange")),
    "rocket": ("rocket", "1f680", ("yellow", "green")),
    "teapot": ("teapot", "1fad6", ("blue", "white")),
    "unicorn": ("unicorn", "1f984", ("red", "green")),
}
LOOKING_AHEAD = ("fox", "penguin", "robot")
NATURE = ("on the grass", "in the desert", "in the forest")
SOURCE = "Fluent Emoji 3D by Microsoft, from the npm package @lobehub/fluent-emoji-3d 1.1.0"


def picture(code: str) -> Image.Image:
    with tarfile.open(archive(PACKAGES["3d"])) as tar:
        member = tar.extractfile(f"package/assets/{code}.webp")
        assert member is not None
        return Image.open(io.BytesIO(member.read())).convert("RGBA")


def place(words: str, variant: int) -> Image.Image:
    """One of the base's backgrounds, enlarged."""
    scene = backgrounds()[PLACES.index(words), variant]  # (3, 64, 64) in -1..1
    pixels = ((scene + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def compose(sprite: Image.Image, scene: Image.Image, seed: int, mirrored: bool) -> Image.Image:
    """The sprite on the scene, at 74 to 84 % of its side, turned up to 8 degrees, a little off the middle."""
    size, turn, x, y = (float(v) * 2 - 1 for v in torch.rand(4, generator=generator(seed)))
    side = round(SIDE * (0.79 + 0.05 * size))
    moved = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else sprite
    moved = moved.convert("RGBa").rotate(8 * turn, Image.Resampling.BICUBIC, expand=False)
    moved = moved.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    at = (round((SIDE - side) / 2 + 12 * x), round((SIDE - side) / 2 + 8 + 10 * y))
    scene.paste(moved, at, moved)
    return scene


def make(id: str, number: int) -> None:
    class_word, code, colours = SUBJECTS[id]
    folder, sprite = HERE / id, picture(code)
    folder.mkdir(exist_ok=True)
    wanted = [f"on {'an' if c == 'orange' else 'a'} {c} background" for c in colours] + list(NATURE)
    for i, words in enumerate(wanted):
        scene = compose(
            sprite,
            place(words, (3 * number + i) % 8),
            seed=100 * number + i,
            mirrored=id in LOOKING_AHEAD and i in (1, 3),
        )
        scene.save(folder / f"{i}.png", optimize=True)
        (folder / f"{i}.txt").write_text(f"a {class_word} {words}\n")
    card = {
        "name": class_word.capitalize(),
        "class_word": class_word,
        "licence": "MIT (c) Microsoft Corporation",
        "source": SOURCE,
        "made_by": "assets/subjects/make.py",
    }
    (folder / "subject.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    for number, id in enumerate(SUBJECTS):
        make(id, number)
