"""One browser for all tests of a process that look at the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.page.test_page import CHROMIUM, browser


@pytest.fixture(scope="session")
def debugger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of its debugging socket."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("browser") / "profile") as address:
        yield address
