"""Pictures from strangers: each kind is handled right or refused in one sentence."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lab.errors import LabError
from lab.uploads import FORMATS, MAX_SIDE, check_count, check_text, decode, decode_all

RED, WHITE = (200, 30, 40), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def near(pixel: Any, expected: tuple[int, int, int], tolerance: int = 4) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def refused(data: Any, **options: Any) -> str:
    with pytest.raises(LabError) as caught:
        decode(data, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode(encoded(Image.new("RGB", (40, 30), RED), format, **options))
    assert (image.mode, image.size, image.info) == ("RGB", (40, 30), {})
    assert type(image) is Image.Image
    assert near(image.getpixel((5, 5)), RED)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is a text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",  # another decoder of Pillow's, not for strangers
        b"\x00" * 100,
        encoded(Image.new("RGB", (20, 20)), "PPM"),
        encoded(Image.new("RGB", (20, 20)), "ICO"),
    ],
)
def test_not_a_picture(data: bytes) -> None:
    assert refused(data, name="Picture 2").startswith("Picture 2 is not a picture that the lab can read: send PNG")


def test_heic_is_told_apart() -> None:
    assert "export them as JPEG" in refused(b"\x00\x00\x00\x18ftypheic" + b"\x00" * 50)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated(format: str, kept: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    sentence = refused(data[: int(len(data) * kept)])
    assert "damaged or cut off" in sentence or "is not a picture" in sentence


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(1)
    for format in FORMATS:
        whole = encoded(Image.effect_noise((48, 48), 50).convert("RGB"), format)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 8):
                data[place] = rng.integers(0, 256)
            try:
                assert decode(bytes(data)).mode == "RGB"
            except LabError as error:
                assert str(error).startswith("The file ")  # noqa: PT017 - either way is right


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\x00" * 10_000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 1), (1, 2**30)])
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int) -> None:
    began = time.process_time()
    sentence = refused(png_header(width, height), name="Picture 1")
    assert time.process_time() - began < 1.0  # a hundred megapixels take longer to decode
    assert sentence.startswith("Picture 1 is too")
    if (width, height) == (10_000, 10_000):
        assert sentence == ("Picture 1 is too large: 10000×10000 is 100 megapixels, at most 50; make it smaller.")


def test_too_small_and_empty_and_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "15×40 pixels, at least 16" in refused(encoded(Image.new("RGB", (15, 40))))
    (tmp_path / "cat.png").touch()
    assert refused(tmp_path / "cat.png") == "'cat.png' is empty: send it again."
    assert refused(b"") == "The file is empty: send it again."
    assert refused(tmp_path / "missing.png") == "'missing.png' could not be read: send it again."
    assert refused(tmp_path) == f"'{tmp_path.name}' could not be read: send it again."
    assert "could not be read" in refused("a\0b.png")
    monkeypatch.setenv("LAB_MAX_UPLOAD_MB", "1")
    big = tmp_path / ("x" * 90 + ".png")
    big.write_bytes(encoded(Image.new("RGB", (20, 20))) + b"\0" * 2**20)
    sentence = refused(big)
    assert sentence == f"'{'x' * 57}...' is too large: at most 1 MB a picture; make it smaller."
    assert str(tmp_path) not in sentence


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert near(decode(data).getpixel((3, 3)), RED)


def test_cmyk() -> None:
    picture = Image.new("RGB", (32, 32), RED).convert("CMYK")
    for format in ("JPEG", "TIFF"):
        assert near(decode(encoded(picture, format)).getpixel((9, 9)), RED, 6), format


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits(format: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = decode(encoded(Image.fromarray(ramp), format))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0] - np.round(ramp / 257.0)).max() <= 1  # not clipped at 255


def test_float_and_long_integer_greys() -> None:
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    assert np.abs(np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF")))[..., 0] - ramp * 255).max() <= 1
    whole = (ramp * 70_000).astype(np.int32)
    assert decode(encoded(Image.fromarray(whole), "TIFF")).getpixel((31, 31)) == WHITE
    ramp[0, 0] = np.nan
    assert decode(encoded(Image.fromarray(ramp * 4000), "TIFF")).getpixel((31, 31)) == WHITE


@pytest.mark.parametrize("size", [(40, 40), (3000, 1500)])
def test_transparent_on_white(size: tuple[int, int]) -> None:
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.paste((*RED, 255), (0, 0, size[0] // 2, size[1]))
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        image = decode(encoded(picture, format, **options))
        assert image.getpixel((image.width - 5, 5)) == WHITE, format
        assert near(image.getpixel((5, 5)), RED), format


def test_other_kinds_of_transparency() -> None:
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert near(decode(encoded(half)).getpixel((0, 0)), (127, 127, 127), 1)
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(1, (0, 0, 10, 20))
    for format in ("PNG", "GIF"):
        image = decode(encoded(palette, format, transparency=0))
        assert image.getpixel((15, 5)) == WHITE
        assert near(image.getpixel((5, 5)), RED)
    keyed = encoded(Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode(keyed).getpixel((0, 0)) == WHITE
    grey = Image.new("LA", (20, 20), (0, 0))
    assert decode(encoded(grey)).getpixel((0, 0)) == WHITE
    assert decode(encoded(Image.new("1", (20, 20), 1))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation(orientation: int, format: str) -> None:
    upright = Image.new("RGB", (48, 32), WHITE)
    upright.paste((0, 0, 0), (0, 0, 16, 16))  # the top left corner
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, format, exif=exif))
    assert image.size == (48, 32)
    assert sum(image.getpixel((4, 4))) < 100
    assert sum(image.getpixel((44, 4))) > 600
    assert sum(image.getpixel((4, 28))) > 600


def test_broken_exif_is_ignored() -> None:
    data = encoded(Image.new("RGB", (20, 20), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x01" * 40)
    assert near(decode(data).getpixel((3, 3)), RED)


def test_no_metadata_comes_along() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    data = encoded(Image.new("RGB", (20, 20)), "JPEG", exif=exif, comment=b"secret", dpi=(300, 300))
    image = decode(data)
    assert image.info == {}
    assert not image.getexif()
    assert b"home" not in encoded(image, "PNG")


def test_colour_profiles() -> None:
    """A picture with another profile is shown as it was meant; a profile that is none changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.new("RGB", (20, 20), RED)
    assert near(decode(encoded(picture, icc_profile=srgb)).getpixel((0, 0)), RED, 2)
    assert near(decode(encoded(picture, icc_profile=b"not a profile" * 20)).getpixel((0, 0)), RED, 2)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_large_pictures_are_shrunk(format: str) -> None:
    image = decode(encoded(Image.new("RGB", (5000, 1250), RED), format))
    assert image.size == (MAX_SIDE, MAX_SIDE // 4)
    assert near(image.getpixel((900, 200)), RED)
    assert decode(encoded(Image.new("RGB", (100, 50)), format), max_side=20).size == (20, 10)


def test_counts() -> None:
    assert check_count(3) == 3
    assert check_count(20) == 20
    for count, given in ((0, "no pictures were given"), (1, "1 picture was given"), (21, "21 pictures were given")):
        with pytest.raises(LabError, match=f"Between 3 and 20 pictures of the subject are needed, {given}"):
            check_count(count)
    good = encoded(Image.new("RGB", (20, 20), RED))
    assert [i.size for i in decode_all([good] * 3)] == [(20, 20)] * 3
    with pytest.raises(LabError, match="Picture 3 is not a picture"):
        decode_all([good, good, b"no", b"no"])
    with pytest.raises(LabError, match="1 picture was"):
        decode_all([good])


def test_texts() -> None:
    assert check_text("Class word", "  red \n\t fox\u0000\u202e ") == "red fox"
    assert check_text("Class word", "cafe\u0301") == "café"
    assert check_text("Caption", None, empty=True) == ""
    for empty in ("", "   ", None, "\u200b"):
        with pytest.raises(LabError, match="Class word is empty: please fill it in"):
            check_text("Class word", empty)
    with pytest.raises(LabError, match="Class word is too long: 500 characters, at most 100"):
        check_text("Class word", "x" * 500)
    with pytest.raises(LabError, match="must be text, got int"):
        check_text("Class word", 5)
