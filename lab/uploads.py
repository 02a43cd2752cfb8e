"""Pictures and words from strangers, made safe: everything that a visitor sends passes through here.

A picture leaves as plain RGB pixels, at most 2048 on a side (training crops and shrinks further), without metadata.
- Formats: PNG, JPEG, WebP, GIF, BMP, TIFF; no other decoder of Pillow's is reachable.
- Refused from the header, before a pixel is decoded: more than 50 megapixels.
- Animated or many-paged files (GIF, WebP, APNG, TIFF): the first frame is the picture.
- Transparency is laid on white. EXIF rotation is applied. 16-bit and float greys are scaled to 8 bits. CMYK, and RGB
  with a colour profile of its own, are converted to sRGB.
"""

from __future__ import annotations

import io
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_SIDE = 2048
MIN_SIDE = 16
MAX_PIXELS = 50_000_000
MAX_PROFILE_BYTES = 4 * 2**20
NOT_A_PICTURE = "is not a picture that the lab can read: send PNG, JPEG, WebP, GIF, BMP or TIFF"


def max_bytes() -> int:
    """Largest accepted file, in bytes (LAB_MAX_UPLOAD_MB, default 25)."""
    given = os.environ.get("LAB_MAX_UPLOAD_MB", "").strip()
    return (int(given) if given.isdecimal() and int(given) else 25) * 2**20


def decode(source: str | Path | bytes, name: str = "", max_side: int = MAX_SIDE) -> Image.Image:
    """One uploaded picture as a fresh RGB image. `name` is how messages call it (default: the file's own name).

    Raises LabError, one sentence, for whatever is wrong with it.
    """
    called = _called(source, name)
    data = _bytes(source, called)
    from PIL import Image

    try:
        # Pillow only warns between one and two of its own limits; `_check_header` refuses all of that.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise LabError(f"{called} is too large: at most {MAX_PIXELS // 10**6} megapixels; make it smaller.") from None
    except Exception:  # decoders raise anything on hostile bytes
        hint = " (iPhone HEIC pictures: export them as JPEG)" if data[4:12] in _HEIC else ""
        raise LabError(f"{called} {NOT_A_PICTURE}{hint}.") from None
    _check_header(image, called)
    try:
        return _plain(image, max_side)
    except MemoryError:
        raise LabError(f"{called} needs more memory than there is: make it smaller.") from None
    except Exception:  # as above
        raise LabError(f"{called} is damaged or cut off: send it again, or leave it out.") from None


def decode_all(sources: Sequence[str | Path | bytes], low: int = 3, high: int = 20) -> list[Image.Image]:
    """All of a subject's pictures, in order. Raises LabError for the first that does not do, or for their number."""
    check_count(len(sources), low, high)
    return [
        decode(source, name=f"Picture {n}" if isinstance(source, bytes) else "") for n, source in enumerate(sources, 1)
    ]


def check_count(count: int, low: int = 3, high: int = 20) -> int:
    """The number of pictures, if it is one that trains. Raises LabError."""
    if not low <= count <= high:
        given = {0: "no pictures were", 1: "1 picture was"}.get(count, f"{count} pictures were")
        raise LabError(f"Between {low} and {high} pictures of the subject are needed, {given} given.")
    return count


def check_text(name: str, value: object, max: int = 100, empty: bool = False) -> str:
    """A short text from outside: trimmed, one line, without control characters. Raises LabError when empty or too long.

    `name` is what the page calls the field; `empty=True` allows an empty text.
    """
    if value is not None and not isinstance(value, str):
        raise LabError(f"{name} must be text, got {type(value).__name__}.")
    text = unicodedata.normalize("NFC", value or "")
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " if c.isspace() else "" for c in text)
    text = re.sub(r"\s+", " ", text).strip()
    if not text and not empty:
        raise LabError(f"{name} is empty: please fill it in.")
    if len(text) > max:
        raise LabError(f"{name} is too long: {len(text)} characters, at most {max}.")
    return text


_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1", b"ftypavif")


def _called(source: str | Path | bytes, name: str) -> str:
    """A picture's name in a sentence: quoted, short, and never a path."""
    if not name and isinstance(source, bytes):
        return "The file"
    text = check_text("name", name or Path(source).name, 10_000, empty=True) if not isinstance(source, bytes) else name
    return text if name else f"'{text[:57] + '...' if len(text) > 60 else text}'"


def _bytes(source: str | Path | bytes, called: str) -> bytes:
    limit = max_bytes()
    try:
        if isinstance(source, bytes):
            data = source
        else:
            with Path(source).open("rb") as file:
                data = file.read(limit + 1)
    except (OSError, ValueError):
        raise LabError(f"{called} could not be read: send it again.") from None
    if not data:
        raise LabError(f"{called} is empty: send it again.")
    if len(data) > limit:
        raise LabError(f"{called} is too large: at most {limit // 2**20} MB a picture; make it smaller.")
    return data


def _check_header(image: Image.Image, called: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise LabError(
            f"{called} is too large: {width}×{height} is {width * height / 1e6:.0f} megapixels, at most "
            f"{MAX_PIXELS // 10**6}; make it smaller."
        )
    if min(width, height) < MIN_SIDE:
        raise LabError(f"{called} is too small: {width}×{height} pixels, at least {MIN_SIDE} on each side.")


def _plain(image: Image.Image, max_side: int) -> Image.Image:
    """Decode: 8-bit sRGB on white, upright, at most `max_side` pixels long."""
    from PIL import Image

    if image.format in ("JPEG", "MPO"):
        image.draft(None, (max_side, max_side))  # decodes at 1/2, 1/4 or 1/8 where that is still larger: less memory
    image.seek(0)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if max(image.size) > max_side:
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif max(image.size) > max_side and image.mode in ("L", "RGB", "CMYK", "YCbCr"):
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    image = _srgb(image, profile)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)  # palettes and bitmaps, which resize badly
    if turn:
        image = image.transpose(Image.Transpose[turn])
    return Image.frombytes("RGB", image.size, image.tobytes())  # fresh: no metadata comes along


# EXIF orientation → the name in Image.Transpose that makes it upright
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF: the picture counts as upright
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or floats, as 8 bits.

    16-bit values are divided by 257. For 32-bit integers and floats the format fixes no white: 65535 (integers) or 1
    (floats) is taken unless the picture goes beyond it, then its own largest value.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    white = 65535.0 if image.mode.startswith("I") else 1.0
    if not image.mode.startswith("I;16"):
        white = max(white, float(np.max(values, where=np.isfinite(values), initial=0.0)))
    grey = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 256):  # some rows at a time: fifty megapixels of floats are 200 MB
        rows = np.nan_to_num(values[top : top + 256].astype(np.float32), posinf=white, neginf=0.0)
        grey[top : top + 256] = np.clip(rows / white * 255.0 + 0.5, 0, 255)
    return Image.fromarray(grey)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """To sRGB by the picture's own colour profile if it has a usable one, else by Pillow's plain conversion."""
    if profile and len(profile) <= MAX_PROFILE_BYTES and image.mode in ("RGB", "CMYK"):
        from PIL import ImageCms

        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except Exception:  # an unusable profile: the picture is shown as if it had none
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
