"""A LAB_HOME for each test of datasets, and pictures to fill one with."""

from __future__ import annotations

import io

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def datasets_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LAB_DATA", raising=False)


def png(colour=(220, 30, 30), number=0, side=20) -> bytes:
    """A one-colour picture; `number` makes it one of its own."""
    image = Image.new("RGB", (side, side), colour)
    image.putpixel((number % side, number // side % side), (number // side**2, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
