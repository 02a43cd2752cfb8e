"""Pictures: training crops, labelled grids. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lab.errors import LabError

Crop = tuple[int, int, int]  # left, top, size: a square in the picture's own pixels


def centre_crop(width: int, height: int) -> Crop:
    """The largest square in the middle: what is trained on unless a crop is chosen."""
    size = min(width, height)
    return (width - size) // 2, (height - size) // 2, size


def crop_box(picture: Image.Image, crop: Sequence[int] | None, number: int = 0) -> Crop:
    """The crop, or the centre's. Raises LabError, naming the picture by its place, when it lies outside."""
    left, top, size = crop or centre_crop(*picture.size)
    if left < 0 or top < 0 or size < 1 or left + size > picture.width or top + size > picture.height:
        raise LabError(
            f"The crop of picture {number + 1}, {size} pixels from {left}, {top}, does not lie within its "
            f"{picture.width} by {picture.height} pixels."
        )
    return left, top, size


@dataclass(frozen=True)
class View:
    """What is trained on of one picture, and where it lies: left, top, right in pixels of the whole picture resized
    by the same factor."""

    picture: Image.Image
    left: int
    top: int
    right: int


def framed(
    picture: Image.Image, crop: Sequence[int] | None, resolution: int, number: int = 0, bucket_step: int = 0
) -> View:
    """The part of a picture that is trained on, at the training resolution.

    The crop's square, or the centre's; with `bucket_step`, a picture without a crop keeps its aspect ratio as nearly
    as a bucket of that step does (`bucket`), and loses no more than that at two sides.
    """
    if bucket_step and crop is None:
        width, height = bucket(picture.width, picture.height, resolution, bucket_step)
    else:
        width = height = resolution
    whole = picture.convert("RGB")
    if width == height:
        left, top, size = crop_box(picture, crop, number)
        scale, right = resolution / size, picture.width - left - size
        view = whole.crop((left, top, left + size, top + size)).resize((width, height), Image.Resampling.LANCZOS)
    else:
        scale = max(width / picture.width, height / picture.height)
        left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
        box = (max(0.0, left), max(0.0, top), picture.width - max(0.0, left), picture.height - max(0.0, top))
        view, right = whole.resize((width, height), Image.Resampling.LANCZOS, box=box), left
    return View(view, round(left * scale), round(top * scale), round(right * scale))


def cropped(picture: Image.Image, crop: Sequence[int] | None, resolution: int, number: int = 0) -> Image.Image:
    """The square that is trained on, at the training resolution."""
    return framed(picture, crop, resolution, number).picture


def bucket_step(resolution: int, vae_scale_factor: int) -> int:
    """Sides of buckets are multiples of this: 64 pixels at SDXL's 1024, as it was trained (section 2.3)."""
    return max(vae_scale_factor, resolution // 16 // vae_scale_factor * vae_scale_factor)


def bucket(width: int, height: int, resolution: int, step: int) -> tuple[int, int]:
    """(width, height) of the bucket whose aspect ratio is nearest: multiples of `step`, at most resolution² pixels,
    sides from half to twice the resolution."""
    wanted, area = math.log(width / height), resolution * resolution
    sides = []
    for side in range(step, 2 * resolution + 1, step):
        other = min(area // side // step * step, 2 * resolution)
        if side * 2 >= resolution and other * 2 >= resolution:
            sides += [(side, other), (other, side)]
    return min(sides, key=lambda pair: (abs(math.log(pair[0] / pair[1]) - wanted), -pair[0] * pair[1]))


def read_folder(folder: Path) -> list[Image.Image]:
    """The comparison's inputs, `000.png 001.png …`, in order."""
    pictures = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side `side`: whole-number nearest neighbour where it is small, so that a 64-pixel
    picture stays as sharp as it is; otherwise Lanczos."""
    factor = side / max(picture.size)
    if factor >= 2:
        whole = round(factor)
        return picture.resize((picture.width * whole, picture.height * whole), Image.Resampling.NEAREST)
    return picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), Image.Resampling.LANCZOS
    )


# -- grids ---------------------------------------------------------------------------------------------
INK, PAPER, FAINT = (28, 30, 36), (255, 255, 255), (110, 114, 124)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font: the same on every machine."""
    return ImageFont.load_default(size)


def grid(
    cells: Sequence[Sequence[Sequence[Image.Image]]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    notes: Sequence[str] = (),
    title: str = "",
    side: int = 192,
    gap: int = 8,
) -> Image.Image:
    """A labelled table of pictures: `cells[row][column]` holds the pictures that lie side by side in one cell.

    `rows` are written above each row, `columns` above the first, `notes` in small print under the column heads.
    """
    across = [max((len(row[c]) for row in cells), default=1) for c in range(len(columns))]
    widths = [n * side + (n - 1) * 2 for n in across]
    width = gap + sum(w + 2 * gap for w in widths)
    head, small, body = font(20), font(13), font(15)
    top = gap + (34 if title else 0)
    row_top = top + 30 + (20 if notes else 0)
    row_height = side + 30 + gap
    sheet = Image.new("RGB", (width, row_top + row_height * len(rows) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), _fit(draw, title, font(22), width - 2 * gap), INK, font(22))
    left = gap
    for c, name in enumerate(columns):
        draw.text((left, top), _fit(draw, name, head, widths[c]), INK, head)
        if c < len(notes):
            draw.text((left, top + 27), _fit(draw, notes[c], small, widths[c]), FAINT, small)
        left += widths[c] + 2 * gap
    for r, name in enumerate(rows):
        y = row_top + r * row_height
        draw.text((gap, y + 4), _fit(draw, name, body, width - 2 * gap), INK, body)
        left = gap
        for c in range(len(columns)):
            for i, picture in enumerate(cells[r][c]):
                sheet.paste(_square(picture, side), (left + i * (side + 2), y + 28))
            left += widths[c] + 2 * gap
    return sheet


def _square(picture: Image.Image, side: int) -> Image.Image:
    shown = enlarged(picture, side)
    if shown.size == (side, side):
        return shown
    tile = Image.new("RGB", (side, side), PAPER)
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    tile.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
    return tile


def _fit(draw: ImageDraw.ImageDraw, text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut with … to the width in pixels."""
    if draw.textlength(text, face) <= width:
        return text
    while text and draw.textlength(text + "…", face) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def strip(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Pictures in a row, two pixels apart."""
    sheet = Image.new("RGB", (len(pictures) * (side + 2) - 2, side), PAPER)
    for i, picture in enumerate(pictures):
        sheet.paste(_square(picture, side), (i * (side + 2), 0))
    return sheet
