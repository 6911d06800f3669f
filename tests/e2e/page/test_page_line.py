"""The browser page when its connection breaks, and behind an API key. Skipped without a browser."""

from __future__ import annotations

import pytest
from websockets.asyncio.client import connect

from edge_vlm_runtime.server.app import Server
from tests.e2e.page.page_visit import Visit
from tests.e2e.page.test_page import CHROMIUM, run, text
from tests.runtime.server.live import open_server
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ASK = (
    "document.getElementById('question').value = 'is there a red ball ?'; "
    "document.getElementById('ask').requestSubmit()"
)
NUM_ANSWERS = (
    "[...document.querySelectorAll('#dialogue .times')]"
    ".filter((times) => times.textContent.includes('seen until')).length"
)


def cut_connections(server: Server) -> None:
    """As a network does that goes away."""

    def cut() -> None:
        for carrier in list(server._carrier.server_state.connections):
            carrier.transport.abort()

    assert server._loop is not None
    server._loop.call_soon_threadsafe(cut)


def test_a_page_comes_back_to_its_session(debugger: str) -> None:
    async def visit(debugger: str, server: Server) -> None:
        async with connect(debugger, max_size=None) as socket:
            page = Visit(socket)
            await page.go(server.page_url)
            await page.value("document.getElementById('camera').click()")
            await page.until(f"parseInt({text('g-frame')}) >= 2")
            await page.value(ASK)
            await page.until(f"{NUM_ANSWERS} === 1")
            (session,) = server._table._sessions
            for count in (2, 3):
                cut_connections(server)
                await page.value(ASK)  # on its way or not: it is answered once
                await page.until(f"{NUM_ANSWERS} === {count}")
                await page.until(f"{text('status')} === 'connected'")
            before = int((await page.value(text("g-frame"))).split()[0])
            await page.until(f"parseInt({text('g-frame')}) > {before}")
            assert list(server._table._sessions) == [session]
            assert await page.value("document.querySelectorAll('#dialogue li').length") == 3
            assert await page.value(text("notice")) == ""

    with open_server() as server:
        server.start()
        run(visit(debugger, server))


def test_a_page_behind_an_api_key(debugger: str) -> None:
    async def visit(debugger: str, server: Server) -> None:
        async with connect(debugger, max_size=None) as socket:
            page = Visit(socket)
            await page.go(f"{server.page_url}#key=a%20secret%2Bkey")
            await page.value("document.getElementById('camera').click()")
            await page.until(f"{text('status')} === 'connected'")
            stranger = Visit(socket)
            stranger._numbers = page._numbers
            await stranger.go(server.page_url)
            await stranger.value("document.getElementById('camera').click()")
            await stranger.until(f"{text('notice')}.includes('API key')")
            await stranger.until(f"{text('status')} === 'not connected'")

    with Server.open(tiny_bundle(), threads=1, api_key="a secret+key") as server:
        server.start()
        run(visit(debugger, server))
