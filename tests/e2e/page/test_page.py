"""The browser page in a real headless browser with a fake camera. Skipped where there is none.

Set PAGE_SCREENSHOT to a file name to look at the page afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import write_video
from tests.tiny import tiny_bundle

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream=device-count=2", "--use-fake-ui-for-media-stream"),
    *("--remote-debugging-port=0", "--window-size=1280,800"),
)
PATIENCE_S = 100.0
"""Of one wait for something on the page."""
VISIT_S = 500.0
"""Of all of them: a film takes its time, and a browser more of it on a busy machine."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def run(visit: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(visit, VISIT_S))


@contextmanager
def browser(profile: Path) -> Iterator[str]:
    """The address of a fresh browser's debugging socket."""
    process = subprocess.Popen(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_S
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert process.poll() is None, "no browser"
            assert time.monotonic() < deadline, "no browser"
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        process.terminate()
        process.wait()


class Page:
    """Drives one tab through the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.console: list[str] = []

    async def open(self, url: str, **where: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank", **where)
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]
        await self.call("Runtime.enable")
        await self.call("Page.enable")
        await self.call("Page.navigate", url=url)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send(json.dumps(message))
        while True:
            reply = json.loads(await self._socket.recv())
            if reply.get("id") == number:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result
            if reply.get("method") == "Runtime.exceptionThrown":
                self.console.append(json.dumps(reply["params"]["exceptionDetails"]))
            if reply.get("method") == "Runtime.consoleAPICalled":
                self.console.append(json.dumps(reply["params"]["args"]))

    async def value(self, script: str) -> Any:
        result = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := await self.value(script)):
            assert time.monotonic() < deadline, (script, self.console, await self.state())
            await asyncio.sleep(0.25)
        return found

    async def state(self) -> str:
        return str(await self.value("document.body.innerText"))

    async def choose(self, selector: str, file: Path) -> None:
        """Gives a file to a file input, as a person would."""
        document = await self.call("DOM.getDocument")
        root = document["root"]["nodeId"]
        found = await self.call("DOM.querySelector", nodeId=root, selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(file)])

    async def screenshot(self, file: Path) -> None:
        picture = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(picture["data"]))


def text(element: str) -> str:
    return f"document.getElementById('{element}').textContent"


def test_camera_or_file_in_answers_and_kept_cells_out(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.webm", num_frames=20, fps=10, codec="libvpx")

    async def visit(debugger: str, url: str) -> None:
        async with connect(debugger, max_size=None) as socket:
            page = Page(socket)
            await page.open(url)
            await page.until("document.readyState === 'complete'")
            assert await page.value("document.title") == "edge-vlm"
            await page.until(f"{text('model')} !== ''")
            assert await page.value("document.getElementById('banner').hidden")  # it has no card
            await page.value("document.getElementById('question').value = 'too early ?'")
            await page.value("document.getElementById('ask').requestSubmit()")
            assert "Start the camera" in await page.value(text("notice"))

            await page.value("document.getElementById('camera').click()")
            await page.until(f"{text('status')} === 'connected'")
            assert await page.value(text("model"))
            await page.until(f"parseInt({text('g-frame')}) >= 3")
            assert "of 9" in await page.value(text("g-kept"))

            await page.value("document.getElementById('question').value = 'is there a red ball ?'")
            await page.value("document.getElementById('ask').requestSubmit()")
            answer = await page.until("document.querySelector('#dialogue .times')?.textContent")
            assert "seen until" in answer
            assert answer.startswith("cut at 1 tokens: the server's --max-answer-tokens allows")
            assert await page.value("document.querySelector('#dialogue .answer').textContent")
            assert "ms" in await page.value(text("g-ttft"))

            drawn = (
                "(() => { const c = document.getElementById('overlay'); "
                "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
                "return d.some((v) => v > 0); })()"
            )
            assert await page.value(drawn)

            await page.value("document.getElementById('keep').value = 20")
            await page.value("document.getElementById('keep').dispatchEvent(new Event('input'))")
            await page.value("document.getElementById('keep').dispatchEvent(new Event('change'))")
            assert await page.value(text("keep-text")) == "20 %"
            await page.until(f"{text('g-memory')}.includes('frames')")
            if "PAGE_SCREENSHOT" in os.environ:
                await page.screenshot(Path(os.environ["PAGE_SCREENSHOT"]))

            await page.value("document.getElementById('stop').click()")
            await page.until("document.getElementById('stop').disabled")

            # So slow that a browser that is held up for a moment misses none of its pictures.
            await page.value("document.getElementById('video').defaultPlaybackRate = 0.25")
            await page.choose("#file", video)
            await page.until("document.getElementById('video').ended")
            await page.until(f"parseInt({text('g-frame')}) >= 4")
            await page.until(f"{text('g-dropped')} === 'none'")
            assert page.console == []

    opened = Server.open(tiny_bundle(), threads=1, settings={"max_answer_tokens": 1})
    with opened as server, browser(tmp_path / "profile") as debugger:
        server.start()
        run(visit(debugger, server.page_url))
