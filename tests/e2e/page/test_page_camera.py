"""The browser page when its camera goes away or stands still. Skipped without a browser."""

from __future__ import annotations

import base64
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from edge_vlm.pixels.frames import Rgb, decode_jpeg
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime.demo.paths import DEMO_FOLDER
from edge_vlm_runtime.protocol.frames import HEADER
from edge_vlm_runtime.server.app import Server
from tests.e2e.page.page_visit import Visit
from tests.e2e.page.page_visit import visited as visit_page
from tests.e2e.page.test_page import CHROMIUM, text
from tests.runtime.server.live import open_server
from tests.tiny import demo_of_short_times

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

TRACK = "document.getElementById('video').srcObject.getVideoTracks()[0]"
VIDEO = "document.getElementById('video')"
SLOW_HERE = (
    "(() => {{ const v = {0}; v.ontimeupdate = () => {{ v.playbackRate = "
    "v.currentTime > {1} && v.currentTime < {2} ? 0.25 : 1; }}; }})()"
)
"""A browser that is held up for a moment misses no picture of these seconds."""
TICKS = "new Promise((done) => setTimeout(done, 1500))"
"""Longer than three pictures would take."""
AGAIN = "document.getElementById('again')"
COUNT = """
window.numSent = 0;
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) {
    if (typeof message !== "string") window.numSent += 1;
    return send.call(this, message);
};
"""
"""Of pictures."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with open_server() as server:
        server.start()
        yield server.page_url


def visited(debugger: str, url: str, steps: Callable[[Visit], Coroutine[Any, Any, None]]) -> None:
    """Visits the page of a server; its camera has sent some pictures."""

    async def whole(page: Visit) -> None:
        await page.value(f"(() => {{ {COUNT} }})()")
        await page.click("#camera")
        await page.until(f"parseInt({text('g-frame')}) >= 3")
        await steps(page)
        await page.click("#stop")

    visit_page(debugger, url, whole)


async def taken(page: Visit) -> int:
    """The number of the last picture that was."""
    return int((await page.value(text("g-frame"))).split()[0])


async def sends_nothing(page: Visit) -> None:
    """Whatever comes of what was sent before: the server may be late with that."""
    await page.value(TICKS)  # what was being encoded goes out
    before = await page.value("window.numSent")
    assert before >= 3
    await page.value(TICKS)
    assert await page.value("window.numSent") == before


def test_a_camera_that_ends_is_said_so_and_can_be_started_again(debugger: str, url: str) -> None:
    async def visit(page: Visit) -> None:
        assert await page.value(f"{AGAIN}.hidden")
        # As when it is unplugged or its permission is taken back: `stop` itself tells nobody.
        await page.value(f"{TRACK}.stop(); {TRACK}.dispatchEvent(new Event('ended'))")
        await page.until(f"{text('notice')}.startsWith('The camera is gone')")
        assert await page.value(text("status")) == "connected, no pictures"
        await sends_nothing(page)
        await page.value("document.getElementById('question').value = 'is there a red ball ?'")
        await page.value("document.getElementById('ask').requestSubmit()")
        await page.until("document.querySelector('#dialogue .times')?.textContent")
        assert "The camera is gone" in await page.value(text("notice"))  # asking hides it not
        before = await taken(page)
        await page.value(f"{AGAIN}.click()")
        await page.until(f"parseInt({text('g-frame')}) > {before}")  # in the same session
        assert await page.value(text("status")) == "connected"
        assert await page.value(text("notice")) == ""
        assert await page.value(f"{AGAIN}.hidden")

    visited(debugger, url, visit)


def test_a_permission_that_is_taken_back(debugger: str, url: str) -> None:
    async def visit(page: Visit) -> None:
        origin = await page.value("location.origin")
        await page.call(
            "Browser.setPermission",
            permission={"name": "camera"},
            setting="denied",
            origin=origin,
            browserContextId=page.context,
        )
        await page.until(f"{TRACK}.readyState === 'ended'")
        await page.until(f"{text('notice')}.startsWith('The camera is gone')")
        await sends_nothing(page)

    visited(debugger, url, visit)


def test_a_muted_camera_sends_nothing_until_it_is_back(debugger: str, url: str) -> None:
    async def visit(page: Visit) -> None:
        await page.value(f"{TRACK}.dispatchEvent(new Event('mute'))")
        await page.until(f"{text('notice')}.startsWith('The camera gives no pictures')")
        await sends_nothing(page)
        before = await taken(page)
        await page.value(f"{TRACK}.dispatchEvent(new Event('unmute'))")
        await page.until(f"parseInt({text('g-frame')}) > {before}")
        assert await page.value(text("notice")) == ""

    visited(debugger, url, visit)


def test_a_frozen_picture_is_not_sent_as_new(debugger: str, url: str) -> None:
    async def visit(page: Visit) -> None:
        await page.value(f"{VIDEO}.pause()")  # the track lives, the element stands still
        await sends_nothing(page)
        await page.until(f"{text('notice')}.startsWith('The camera gives no new pictures')")
        before = await taken(page)
        await page.value(f"{VIDEO}.play()")
        await page.until(f"parseInt({text('g-frame')}) > {before}")
        await page.until(f"{text('notice')} === ''")

    visited(debugger, url, visit)


def write_film(path: Path, pictures: list[Rgb]) -> None:
    """Two pictures a second."""
    with av.open(str(path), "w") as container:
        track = container.add_stream("libvpx", rate=2, options={"crf": "4", "b": "4M"})
        track.height, track.width = pictures[0].shape[:2]
        for rgb in pictures:
            container.mux(track.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(track.encode())


SENT = """
window.sent = [];
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) {
    if (message instanceof Uint8Array) window.sent.push(btoa(String.fromCharCode(...message)));
    return send.call(this, message);
};
"""


def test_pictures_of_a_film_carry_their_own_time(debugger: str, url: str, tmp_path: Path) -> None:
    """Each is as grey as its number says: at four times the speed a busy page misses some."""
    pictures = [np.full((96, 96, 3), 8 + 15 * number, np.uint8) for number in range(16)]
    write_film(tmp_path / "film.webm", pictures)
    sent: list[bytes] = []

    async def visit(page: Visit) -> None:
        await page.value(f"(() => {{ {SENT} }})()")
        await page.value(f"{VIDEO}.defaultPlaybackRate = 4")
        await page.choose("#file", tmp_path / "film.webm")
        await page.until(f"{VIDEO}.ended")
        sent.extend(map(base64.b64decode, await page.value("window.sent")))

    visit_page(debugger, url, visit)
    assert len(sent) >= 2
    for message in sent:
        header = HEADER.unpack_from(message)
        number = round((decode_jpeg(message[HEADER.size :]).mean() - 8) / 15)
        assert header[-1] == number * 500_000


def test_an_answer_shows_the_time_of_the_film(debugger: str, tmp_path: Path) -> None:
    """The model's own stamps were moved: the demo's clip comes after its first picture has stood
    for longer than these reach."""
    pictures = [rgb for _, rgb in read_video(DEMO_FOLDER / "clip.mp4", 2.0)]
    write_film(tmp_path / "film.webm", [pictures[0]] * 18 + pictures[:8])

    async def visit(page: Visit) -> None:
        await page.value(SLOW_HERE.format(VIDEO, 9.0, 11.5))
        await page.choose("#file", tmp_path / "film.webm")
        await page.until(f"{VIDEO}.ended")
        await page.submit("ask", "question", "When did the mushroom appear?")
        await page.until("document.querySelector('#dialogue .times')?.textContent")
        said = await page.value("document.querySelector('#dialogue .answer').textContent")
        assert said in ("at 10.0 s", "at 10.5 s", "at 11.0 s")

    with Server.open(demo_of_short_times(tmp_path), threads=1) as server:
        server.start()
        visit_page(debugger, server.page_url, visit)
