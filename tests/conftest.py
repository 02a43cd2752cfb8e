"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The row of a random-weight SDXL of 16 pixels, registered as "small-sdxl"."""
    from tests import small_sdxl as small

    yield small.register(small.build(tmp_path_factory.mktemp("small-sdxl")))
    small.unregister()
