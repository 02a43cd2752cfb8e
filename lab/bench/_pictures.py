"""Pictures of nothing in particular, for benchmarks."""

from __future__ import annotations

from PIL import Image, ImageDraw


def discs(side: int = 64, count: int = 3) -> list[Image.Image]:
    """Discs of one colour, each a little lower than the last."""
    pictures = []
    for i in range(count):
        picture = Image.new("RGB", (side, side), (60 * i, 90, 160))
        ImageDraw.Draw(picture).ellipse((side // 6, side // 6 + 3 * i, side // 2, side // 2), fill=(240, 140, 30))
        pictures.append(picture)
    return pictures
