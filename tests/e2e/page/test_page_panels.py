"""What the page's panels do, in one browser on a server with the demo model. Skipped without a
browser."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cameras.keeper import CameraFile
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE, DEMO_FOLDER
from edge_vlm_runtime.server.app import Server
from tests.e2e.page.page_visit import DESKTOP, LARGE, PHONE, Visit, visit, visited
from tests.e2e.page.test_page import CHROMIUM, run, text
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.server.reverse_proxy import ReverseProxy

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROOT = Path(__file__).parents[3]
AXE = Path(os.environ.get("EDGE_VLM_AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
MUSHROOM = "Is there a mushroom now?"
TIMES = "[...document.querySelectorAll('#dialogue .times')].filter((e) => e.textContent).length"
HIGHEST = "document.documentElement"


class Site(NamedTuple):
    debugger: str
    url: str


@pytest.fixture(scope="module")
def site(debugger: str) -> Iterator[Site]:
    plan = read_plan(
        {
            "camera": [
                {"name": "bench", "source": str(DEMO_FOLDER / "clip.mp4")},
                {"name": "yard", "source": "/nowhere/to/be/found.sdp"},
            ],
            "alert": [{"name": "fungus", "camera": "bench", "question": MUSHROOM}],
        },
        Path("cameras.toml"),
    )
    with Server.open(DEMO_BUNDLE, threads=1, cameras=CameraFile(plan=plan)) as server:
        server.start()
        yield Site(debugger, server.page_url)


async def play_until(page: Visit, seconds: float) -> None:
    """The film then stands still, however slow this machine is."""
    await page.value(
        "(() => { const v = document.getElementById('video'); v.playbackRate = 2; "
        f"v.ontimeupdate = () => {{ if (v.currentTime >= {seconds}) v.playbackRate = 0; }}; }})()"
    )
    await page.until("document.getElementById('video').playbackRate === 0")


async def watch_demo(page: Visit) -> None:
    """Until all four things are there."""
    await page.click("#demo")
    await page.until(f"{text('status')} === 'connected'")
    await play_until(page, 3.7)
    await page.until(f"parseInt({text('g-frame')}) >= 3")


def test_the_first_five_minutes(site: Site) -> None:
    async def steps(page: Visit) -> None:
        # Before anything runs: what the model is, and choices that hold afterwards.
        assert "This is a toy model" in await page.says("banner", "40 cartoon things")
        await page.put("keep", "30")
        await page.put("policy", "random")
        assert "about 5 are read: any, by chance" in await page.value(text("keep-words"))
        await page.submit("alert-form", "alert-question", MUSHROOM)
        await page.says("alert-list", "nothing runs")

        await watch_demo(page)
        assert await page.value(text("keep-text")) == "30 %"
        assert await page.value("document.getElementById('policy').value") == "random"
        await page.until(f"/of 16 \\((25|31|38) %\\)/.test({text('g-kept')})")
        await page.put("policy", "keep_all")  # and while it runs
        await play_until(page, 4.7)
        await page.until(f"{text('g-kept')}.includes('100 %')")

        await page.says("alert-list", "happening now")
        await page.says("history", "sure")
        await page.until("document.querySelector('#history img')?.naturalWidth > 0")
        assert await page.value("document.title") == "(1) edge-vlm"

        await page.click("#chips button", 4)
        await page.until(f"{TIMES} === 1")
        assert await page.value("document.querySelector('#dialogue .answer').textContent") == (
            "mushroom"  # without its markup
        )
        await page.until("!!document.querySelector('#dialogue canvas')")
        await page.says("saved", "saved so far")
        await page.until("document.querySelector('#c-ttft polyline').getAttribute('points') !== ''")
        assert "mean" in await page.value("document.getElementById('c-ttft').ariaLabel")
        assert await page.value("document.getElementById('tile-rss').hidden") is False

        # The question is had again by an arrow, the conversation by a reload.
        await page.value(
            "document.getElementById('question').dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'ArrowUp'}))"
        )
        assert await page.value("document.getElementById('question').value") == (
            "Point to the mushroom."
        )
        await page.click("#stop")
        assert await page.value("document.body.classList.contains('stale')")
        await page.says("history", "its end was not seen")
        await page.click("#banner-close")
        await page.call("Page.reload")
        await page.until("document.readyState === 'complete'")
        await page.says("dialogue", "Point to the mushroom.")
        await page.until("document.querySelector('#dialogue img')?.naturalWidth > 0")
        await page.says("history", MUSHROOM)
        await page.says("alert-list", MUSHROOM)
        await page.says("model", "demo")
        assert await page.value("document.getElementById('banner').hidden")
        assert await page.value("document.getElementById('policy').value") == "keep_all"

        # What is saved is the conversation.
        await page.value(
            "window.saved = new Promise((done) => { URL.createObjectURL = (blob) => "
            "{ if (blob.type === 'text/markdown') blob.text().then(done); return '#'; }; }); true"
        )
        await page.click("#export")
        saved = await page.value("window.saved")
        assert saved.startswith(
            "# Conversation with edge-vlm\n\n**Point to the mushroom.**  \nmush"
        )
        await page.click("#clear")
        assert await page.value("document.querySelectorAll('#dialogue li').length") == 0

    visited(site.debugger, site.url, steps)


def test_alerts_that_a_server_does_not_take_are_kept_for_the_next(site: Site) -> None:
    kept = "JSON.parse(localStorage.getItem('edge-vlm.alerts')).length"
    rules = [
        {"question": f"Is there a {i} now?", "on_threshold": 0.7, "off_threshold": 0.4}
        for i in range(17)
    ]

    async def steps(page: Visit) -> None:
        await page.value(f"localStorage.setItem('edge-vlm.alerts', {json.dumps(rules)!r})")
        await page.call("Page.reload")
        await page.until("document.querySelectorAll('#alert-list li').length === 17")
        await page.click("#demo")
        await page.until("document.querySelectorAll('#alert-list [data-state=refused]').length")
        assert "has 16 alerts already" in await page.value(text("alert-trouble"))
        assert await page.value("document.querySelectorAll('#alert-list li').length") == 17
        assert await page.value(kept) == 17
        await page.submit("alert-form", "alert-question", "One more?")  # a new one is not kept
        await page.says("alert-trouble", "One more?")
        assert await page.value(kept) == 17

    visited(site.debugger, site.url, steps)


def test_a_camera_of_the_server(site: Site) -> None:
    async def steps(page: Visit) -> None:
        await page.until("document.querySelectorAll('#cameras li').length === 2")
        await page.says("cameras", "waiting")
        await page.click("#cameras button")
        await page.until(
            "!document.getElementById('still').hidden || "
            f"{text('status')} === 'connected, no pictures'"
        )
        await page.until("document.getElementById('settings-fields').disabled")
        await page.click("#chips button")
        await page.until(f"{TIMES} === 1")
        assert "seen until" in await page.value(text("dialogue"))
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": "How many things are there now?"}],
            "edge_vlm": {"session": "bench"},
        }
        request = urllib.request.Request(
            f"{site.url}v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=60) as reply:
            told = json.load(reply)["choices"][0]["message"]["content"]
        await page.says("dialogue", "How many things are there now? (asked elsewhere)")
        await page.until(f"{TIMES} === 2")
        assert told.strip() in await page.value(text("dialogue"))
        await page.says("alert-list", "fungus: Is there a mushroom now?")
        await page.says("history", "bench, fungus")  # from before anybody looked
        await page.click("#alert-list button")
        await page.says("notice", "the server's file")
        await page.click("#cameras button", 1)
        await page.until(f"{text('notice')} !== ''")
        await page.click("#stop")
        assert not await page.value("document.getElementById('settings-fields').disabled")

    visited(site.debugger, site.url, steps)


def test_what_cannot_be_shown_is_said(site: Site, tmp_path: Path) -> None:
    picture, no_picture = tmp_path / "still.jpg", tmp_path / "broken.png"
    picture.write_bytes(jpeg(1))
    no_picture.write_bytes(b"\x89PNG no picture")
    no_video = tmp_path / "README.md"
    no_video.write_text("# words")
    no_pictures = tmp_path / "tone.wav"
    with wave.open(str(no_pictures), "wb") as tone:
        tone.setnchannels(1)
        tone.setsampwidth(2)
        tone.setframerate(8000)
        tone.writeframes(bytes(16000))

    async def steps(page: Visit) -> None:
        await page.choose("#file", no_picture)
        await page.says("notice", "broken.png is no picture that this browser can read")
        await page.choose("#file", no_video)
        await page.says("notice", "cannot play README.md: it is no video")
        await page.choose("#file", no_pictures)
        await page.says("notice", "tone.wav has sound alone")
        await page.until(f"{text('status')} === 'not connected'")
        drop = (
            "document.dispatchEvent(Object.assign(new Event('drop', {cancelable: true}), "
            "{dataTransfer: {files: %s}}))"
        )
        await page.value(drop % "[]")
        await page.says("notice", "Drop a file of this device")
        code = base64.b64encode(picture.read_bytes()).decode()
        await page.value(
            f"fetch('data:image/jpeg;base64,{code}')".replace(
                "fetch(",
                "(async (u) => new File("
                "[Uint8Array.from(atob(u.split(',')[1]), (c) => c.charCodeAt(0))], 'still.jpg', "
                "{type: 'image/jpeg'}))(",
            )
            + f".then((file) => {drop % '[file]'})"
        )
        await page.until(f"parseInt({text('g-frame')}) === 1")
        assert not await page.value("document.getElementById('still').hidden")
        await page.click("#chips button", 1)
        await page.until(f"{TIMES} === 1")
        await page.click("#stop")

        await page.value(  # the browser of these tests asks nobody
            "navigator.mediaDevices.getUserMedia = () => "
            "Promise.reject(new DOMException('no', 'NotAllowedError')); true"
        )
        await page.click("#camera")
        await page.says("notice", "The browser may not use the camera. Allow it for this page")
        await page.value(  # as on a page without https
            "Object.defineProperty(navigator, 'mediaDevices', {value: undefined})"
        )
        await page.click("#camera")
        await page.says("notice", "only to https pages and to localhost: start the server with")

    visited(site.debugger, site.url, steps)


def test_a_restarted_server_is_had_again(debugger: str) -> None:
    async def steps(page: Visit) -> None:
        async with ReverseProxy(0, keeps_host=True) as proxy:
            with Server.open(DEMO_BUNDLE, threads=1) as first:
                proxy.upstream_port = first.port
                first.start()
                await page.go(f"{proxy.origin}/")
                await page.submit("alert-form", "alert-question", MUSHROOM)
                await page.put("keep", "80")
                await page.click("#camera")
                await page.until(f"parseInt({text('g-frame')}) >= 2")
                await page.until("!document.querySelector('#alert-list meter').hidden")
                # Another camera of this device: the session stays.
                await page.until("document.querySelectorAll('#device option').length === 2")
                other = "document.getElementById('device').options[1].value"
                await page.put("device", await page.value(other))
                track = "document.getElementById('video').srcObject.getVideoTracks()[0]"
                await page.until(f"{track}.getSettings().deviceId === {other}")
                assert len(first._table.all_sessions) == 1
                before = int((await page.value(text("g-frame"))).split()[0])
                await page.until(f"parseInt({text('g-frame')}) > {before}")
            await page.says("status", "the server is away")
            await page.submit("ask", "question", "Is anybody there?")
            await page.says("notice", "ask when it is back")
            assert await page.value("document.body.classList.contains('stale')")
            with Server.open(DEMO_BUNDLE, threads=1) as second:
                proxy.upstream_port = second.port
                second.start()
                await page.says("dialogue", "its memory is empty")
                await page.until(f"{text('status')} === 'connected'")
                await page.until(f"parseInt({text('g-frame')}) >= 1")
                await page.until("!document.querySelector('#alert-list meter').hidden")
                assert await page.value(text("keep-text")) == "80 %"
                assert not await page.value("document.body.classList.contains('stale')")

    async def whole() -> None:
        async with visit(debugger) as page:
            await steps(page)

    run(whole())


def test_a_key_and_the_addresses_for_other_devices(debugger: str) -> None:
    async def steps(page: Visit) -> None:
        await page.says("key-label", "This server wants an API key")
        await page.submit("key-form", "key", "wrong")
        await page.says("key-label", "That is not its API key")
        await page.click("#camera")
        await page.says("notice", "API key")
        await page.submit("key-form", "key", "secret")
        await page.says("model", "demo")
        assert await page.value("document.getElementById('key-form').hidden")
        await page.says("address-notes", "The codes hold the API key")
        await page.until("document.querySelector('.qr')?.naturalWidth > 0")
        await watch_demo(page)

    with Server.open(DEMO_BUNDLE, threads=1, host="0.0.0.0", api_key="secret") as server:
        server.start()
        visited(debugger, server.page_url, steps)


def test_an_older_server(site: Site) -> None:
    port = int(site.url.rpartition(":")[2].strip("/"))

    async def whole() -> None:
        missing = ("/v1/streams", "/v1/edge_vlm/page")
        async with (
            ReverseProxy(port, keeps_host=True, missing=missing) as proxy,
            visit(site.debugger) as page,
        ):
            await page.go(f"{proxy.origin}/")
            await page.says("address-notes", "it is an older version")
            assert await page.value("document.getElementById('cameras').hidden")
            await watch_demo(page)
            assert await page.value(text("notice")) == ""

    run(whole())


def test_every_size_has_picture_and_question_together(site: Site) -> None:
    shown = (
        "(() => {{ const b = document.querySelector({0!r}).getBoundingClientRect(); return b.top "
        ">= 0 && b.bottom <= innerHeight && b.left >= 0 && b.right <= innerWidth && b.height > 30;"
        " }})()"
    )
    share = "document.getElementById('stage').getBoundingClientRect().height / innerHeight"

    async def steps(page: Visit) -> None:
        await page.until("document.querySelectorAll('#cameras li').length === 2")
        await page.says("banner", "toy")
        await page.resize(PHONE)  # where that leaves the least room
        for seen in ("#stage", "#question", "#ask [type=submit]", "#chips"):
            await page.until(shown.format(seen))
        await watch_demo(page)
        await page.click("#chips button")
        await page.until(f"{TIMES} === 1")
        for size in (DESKTOP, PHONE, LARGE):
            await page.resize(size)
            for seen in ("#stage", "#question", "#ask [type=submit]", "#dialogue li"):
                await page.until(shown.format(seen))
            assert await page.value(f"{HIGHEST}.scrollWidth <= innerWidth"), size
            small = await page.value(
                "[...document.querySelectorAll('button, .button, select, .toggle')].filter((e) => "
                "e.offsetHeight > 0 && e.getBoundingClientRect().height < 31).map((e) => e.id)"
            )
            assert small == []
        for name in ("chat", "alerts", "figures", "settings"):  # at once on a large screen
            await page.until(shown.format(f"#panel-{name}"))
        assert await page.value(share) > 0.7
        await page.resize(DESKTOP)
        assert await page.value(share) > 0.4
        # The focus ring of the file field is on the button that stands for it.
        await page.value("document.getElementById('file').focus({focusVisible: true})")
        ring = "getComputedStyle(document.querySelector('label[for=file]')).outlineStyle"
        assert await page.value(ring) == "solid"
        await page.value("document.getElementById('tab-chat').focus()")
        await page.value(
            "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'ArrowRight', bubbles: true}))"
        )
        assert await page.value("document.activeElement.id") == "tab-alerts"
        assert await page.value("document.body.dataset.tab") == "alerts"

    visited(site.debugger, site.url, steps)


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: npm install --no-save axe-core@4")
def test_axe_finds_nothing(site: Site) -> None:
    check = (
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', "
        "'best-practice']}).then((found) => found.violations.map((each) => "
        "[each.id, each.nodes.map((node) => node.html)]))"
    )

    async def steps(page: Visit) -> None:
        await page.says("banner", "toy")
        await page.value(f"{AXE.read_text()}; true")
        assert await page.value(check) == []
        await page.submit("alert-form", "alert-question", MUSHROOM)
        await watch_demo(page)
        await page.click("#chips button")
        await page.until(f"{TIMES} === 1")
        await page.says("history", MUSHROOM)
        for size, dark in ((DESKTOP, False), (PHONE, True)):
            await page.resize(size, dark=dark)
            for name in ("chat", "alerts", "figures", "settings"):
                await page.click(f"#tab-{name}")
                assert await page.value(check) == [], (size, dark, name)
        for dark in (False, True):
            await page.resize(LARGE, dark=dark)  # all panels
            assert await page.value(check) == [], (LARGE, dark)

    visited(site.debugger, site.url, steps)
