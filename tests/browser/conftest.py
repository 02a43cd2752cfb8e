"""One page for all tests of a process: each visits it as somebody else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import server


@pytest.fixture(scope="session")
def page_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("home")) as address:
        yield address
