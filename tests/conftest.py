"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The row of a random-weight SDXL of 16 pixels, registered as "small-sdxl"."""
    from tests import small_sdxl as small

    yield small.register(small.build(tmp_path_factory.mktemp("small-sdxl")))
    small.unregister()


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LAB_HOME of the test module's own."""
    home = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def one_thread() -> None:
    """torch on one thread: the same sums whatever the machine, and no quarrel among the tests' workers."""
    import torch

    torch.set_num_threads(1)
