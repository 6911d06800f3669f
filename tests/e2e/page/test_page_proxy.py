"""The browser page behind a real reverse proxy. Skipped without a browser."""

from __future__ import annotations

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.server.access.origins import Origins
from edge_vlm_runtime.server.app import Server
from tests.e2e.page.page_visit import Visit
from tests.e2e.page.test_page import CHROMIUM, run, text
from tests.runtime.server.live import open_server
from tests.runtime.server.reverse_proxy import ReverseProxy
from tests.tiny import tiny_bundle

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
CAMERA = "document.getElementById('camera').click()"


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the log; on a busy machine asyncio, which checks itself in tests, has some, too."""
    own = (record for record in caplog.records if record.name.startswith("edge_vlm"))
    return [record.getMessage() for record in own]


async def open_page(page: Visit, proxy: ReverseProxy) -> None:
    await page.go(f"{proxy.origin}/vlm/")
    await page.value(CAMERA)


@needs_browser
@pytest.mark.parametrize("keeps_host", [True, False])
def test_the_page_works_below_a_path_and_with_another_host(debugger: str, keeps_host: bool) -> None:
    async def visit(debugger: str) -> None:
        async with ReverseProxy(0, prefix="/vlm", keeps_host=keeps_host) as proxy:
            origins = [] if keeps_host else [proxy.origin]
            with Server.open(tiny_bundle(), threads=1, origins=origins) as server:
                proxy.upstream_port = server.port
                server.start()
                async with connect(debugger, max_size=None) as socket:
                    page = Visit(socket)
                    await open_page(page, proxy)
                    await page.until(f"parseInt({text('g-frame')}) >= 2")
                    assert await page.value(text("status")) == "connected"
                    assert page.console == []
            assert proxy.not_found == []

    run(visit(debugger))


@needs_browser
def test_a_page_that_is_refused_says_what_to_do(
    debugger: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def visit(debugger: str, server: Server) -> None:
        async with ReverseProxy(server.port, prefix="/vlm") as proxy:
            async with connect(debugger, max_size=None) as socket:
                page = Visit(socket)
                await open_page(page, proxy)
                notice = await page.until(text("notice"))
                assert f"--allow-origin {proxy.origin}" in notice
                await page.until(f"{text('status')} === 'not connected'")
            (line,) = own_lines(caplog)
            assert f"Origin is '{proxy.origin}'" in line
            assert f"'localhost:{server.port}'" in line
            assert f"--allow-origin {proxy.origin}" in line

    with open_server() as server:
        server.start()
        run(visit(debugger, server))


def test_an_allowed_page_may_connect_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    origins = ["https://Camera.example.org:443/", "http://[::1]:8080"]

    async def session(server: Server, origin: str) -> None:
        async with connect(server.url, additional_headers={"Origin": origin}) as raw:
            await raw.recv()

    with Server.open(tiny_bundle(), threads=1, origins=origins) as server:
        server.start()
        run(session(server, "https://camera.example.org"))
        run(session(server, "http://[::1]:8080"))
        for _ in range(3):
            with pytest.raises(InvalidStatus, match="403"):
                run(session(server, "https://elsewhere.example"))
        with pytest.raises(InvalidStatus, match="403"):
            run(session(server, "http://camera.example.org"))  # not encrypted
    lines = own_lines(caplog)
    assert len(lines) == 2  # each once
    assert "'https://elsewhere.example'" in lines[0]


def test_pages_that_try_again_and_again_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    origins = Origins()
    for number in range(1000):
        assert not origins.allows(f"http://page{number}.example\n", "camera")
    assert len(caplog.records) == 100
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "origin",
    ["", "*", "null", "camera.example.org", "https://a/b", "https://a:99999", "ftp://a", "http://"],
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="not an origin"):
        Origins([origin])
