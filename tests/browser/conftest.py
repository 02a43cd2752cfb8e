"""One page a module of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import server


@pytest.fixture(scope="module")
def page_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("home")) as address:
        yield address
