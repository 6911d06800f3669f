"""What all tests over a real socket share: patience, and one browser of a process for those that
look at the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_vlm_runtime.client import exchange
from tests.e2e.page.test_page import CHROMIUM, browser
from tests.runtime.server.live import TIMEOUT_S


@pytest.fixture(autouse=True)
def _a_session_may_take_long_to_end() -> Iterator[None]:
    """The engines of a busy machine may be late with it, and a client that gives up before is not
    told its last events."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CLOSE_TIMEOUT_S", TIMEOUT_S)
        yield


@pytest.fixture(scope="session")
def debugger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of its debugging socket."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("browser") / "profile") as address:
        yield address
