"""The pictures: three emoji sets, fetched once, kept as one tensor file in the pretraining home."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import torch
from PIL import Image

from lab.errors import LabError
from lab.pretrain.common import home, save_atomic
from lab.pretrain.concepts import HELD_OUT, HELD_OUT_SHORT_NAMES, SHORT_NAMES, STYLES

PACKAGES = {  # style -> npm package, in the order of concepts.STYLES
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "emoji-datasource-twitter@16.0.0",
    "noto": "emoji-datasource-google@16.0.0",
}
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
SIDE = 64


class Sprites:
    """Pictures with their names.

    images: uint8 (n, 4, 64, 64), RGBA · names: the distinct names, nameable concepts first, then the
    held-out subjects, then every other emoji · concept, style: for each picture its index in names and STYLES.
    """

    def __init__(self, images: torch.Tensor, concept: torch.Tensor, style: torch.Tensor, names: list[str]):
        self.images, self.concept, self.style, self.names = images, concept, style, names
        self.nameable_count = len(SHORT_NAMES)
        held = range(self.nameable_count, self.nameable_count + len(HELD_OUT))
        is_held = (concept >= held.start) & (concept < held.stop)
        rows = torch.arange(len(concept))
        self.nameable = rows[concept < self.nameable_count]  # pictures of the concepts the base can name
        self.held_out = rows[is_held]  # pictures no training stage may see
        self.trainable = rows[~is_held]  # everything else

    def find(self, name: str, style: str) -> int:
        """The row of the picture of a name in a style."""
        hit = (self.concept == self.names.index(name)) & (self.style == STYLES.index(style))
        return int(hit.nonzero()[0])


def archive(package: str) -> Path:
    """The package's archive in the pretraining home, fetched with npm where it is missing."""
    name, _, version = package.rpartition("@")
    path = home() / "data" / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=path.parent, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LabError(
                f"The emoji pictures need `npm pack {package}`, which failed here: install npm, "
                f"or put the archive at {path}."
            ) from error
    return path


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise LabError(f"The archive's {member} is not a file: delete the archive, so that it is fetched again.")
    with file:
        return file.read()


def _pictures(path: Path, folder: str) -> dict[str, Image.Image]:
    """File stem -> RGBA picture, side 64, for every picture in a folder of the archive."""
    pictures = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(f"package/{folder}/"):
                picture = Image.open(io.BytesIO(_read(tar, member))).convert("RGBA")
                if picture.width != SIDE:  # premultiplied, or colours of invisible pixels bleed into the edge
                    picture = picture.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
                pictures[Path(member.name).stem] = picture
    return pictures


def _emoji_table() -> list[dict]:
    with tarfile.open(archive(PACKAGES["noto"])) as tar:
        table = json.loads(_read(tar, "package/emoji.json"))
    return sorted((e for e in table if e["category"] in CATEGORIES), key=lambda e: e["sort_order"])


def prepare() -> Path:
    """Fetch and unpack the pictures into one tensor file; does nothing where it exists."""
    lists = hashlib.sha1(repr((SHORT_NAMES, HELD_OUT_SHORT_NAMES, CATEGORIES, PACKAGES)).encode()).hexdigest()[:8]
    path = home() / "data" / f"sprites-{lists}.pt"
    if path.exists():
        return path
    plain = {short: name for name, short in {**SHORT_NAMES, **HELD_OUT_SHORT_NAMES}.items()}
    table = _emoji_table()
    taken = set(plain.values())  # four official names are also the plain name of another picture: left out
    table = [e for e in table if e["short_name"] in plain or e["name"].lower() not in taken]
    others = [e["name"].lower() for e in table if e["short_name"] not in plain]
    names = list(dict.fromkeys([*SHORT_NAMES, *HELD_OUT, *others]))
    folders = {"3d": "assets", "flat": "img/twitter/64", "noto": "img/google/64"}
    images, concept, style = [], [], []
    for style_id, key in enumerate(STYLES):
        pictures = _pictures(archive(PACKAGES[key]), folders[key])
        for e in table:
            code = Path(e["image"]).stem
            picture = pictures.get(code) or pictures.get(code.replace("-fe0f", ""))
            if picture is not None:
                images.append(
                    torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                    .view(SIDE, SIDE, 4)
                    .permute(2, 0, 1)
                )
                concept.append(names.index(plain.get(e["short_name"], e["name"].lower())))
                style.append(style_id)
    save_atomic(
        {"images": torch.stack(images), "concept": torch.tensor(concept), "style": torch.tensor(style), "names": names},
        path,
    )
    return path


def load_sprites() -> Sprites:
    """The prepared pictures."""
    data = torch.load(prepare(), weights_only=True)
    return Sprites(data["images"], data["concept"], data["style"], data["names"])
