"""Films the browser page for the README: `python -m docs.make_gif docs/images/live.gif`.

A stretch of held-out footage of the rendered world is played to the demo model through the page in
a headless Chromium. An alert is set, questions are asked, and what the page shows is taken down as
it comes. Needs Chromium and the extras `train` (which renders) and `ort`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.server.app import Server
from edge_vlm_training.world.heldout_events import heldout_footage

SEED, SECONDS, FPS = 2, 15.0, 4.0
"""Of the footage; how long is filmed; pictures of the page a second."""
ALERT = "Is there a cat now?"
"""It comes after six seconds."""
WINDOW = (1160, 730)
WIDTH, COLOURS = 820, 128
ASK = (
    "document.getElementById('question').value = {}; document.getElementById('ask').requestSubmit()"
)
SHOW = "document.getElementById('tab-{}').click()"
STEPS = (
    (4.0, ASK.format(json.dumps("What is there now?"))),
    (6.0, SHOW.format("alerts")),
    (10.0, SHOW.format("chat")),
    (10.5, ASK.format(json.dumps("How many things are there now?"))),
)
"""What is done in the page, and when."""
PATIENCE_S = 60.0


class Tab:
    """A page of a headless browser, driven by the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._session: str | None = None

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"id": next(self._numbers), "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send(json.dumps(message))
        while True:
            reply = json.loads(await self._socket.recv())
            if reply.get("id") == message["id"]:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                result: dict[str, Any] = reply["result"]
                return result

    async def open(self, url: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]
        width, height = WINDOW
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        await self.call("Page.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        result = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    async def until(self, script: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not await self.run(script):
            if time.monotonic() > deadline:
                raise TimeoutError(script)
            await asyncio.sleep(0.1)

    async def choose(self, selector: str, file: Path) -> None:
        document = await self.call("DOM.getDocument")
        found = await self.call(
            "DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector
        )
        await self.call("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(file)])

    async def picture(self) -> Image.Image:
        taken = await self.call("Page.captureScreenshot", format="jpeg", quality=92)
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


@contextmanager
def browser(profile: Path) -> Iterator[str]:
    """The address of a fresh browser's debugging socket."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        raise SystemExit("docs.make_gif needs Chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")
    process = subprocess.Popen(
        [program, *flags, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_S
        while not (told.exists() and len(told.read_text().split()) == 2):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the browser does not start")
            time.sleep(0.1)
        port, path = told.read_text().split()
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        process.terminate()
        process.wait()


def write_film(file: Path) -> None:
    footage = next(iter(heldout_footage(SEED, 1, 48)))
    pictures = [decode_jpeg(jpeg) for jpeg in footage.jpegs]
    with av.open(str(file), "w") as container:
        track = container.add_stream("libvpx", rate=2, options={"crf": "4", "b": "4M"})
        track.height, track.width = pictures[0].shape[:2]
        for rgb in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            container.mux(track.encode(frame))
        container.mux(track.encode())
    if not any(watch.question == ALERT and watch.events for watch in footage.watches):
        raise SystemExit(f"{ALERT!r} is never true in footage of seed {SEED}: take another")


async def film(debugger: str, url: str, clip: Path) -> list[Image.Image]:
    async with connect(debugger, max_size=None) as socket:
        tab = Tab(socket)
        await tab.open(url)
        await tab.run("document.getElementById('banner-close').click()")
        await tab.run(f"document.getElementById('alert-question').value = {json.dumps(ALERT)}")
        await tab.run("document.getElementById('alert-form').requestSubmit()")
        await tab.choose("#file", clip)
        await tab.until("parseInt(document.getElementById('g-frame').textContent) >= 1")
        taken, began, steps = [], time.monotonic(), list(STEPS)
        while (now := time.monotonic() - began) < SECONDS:
            if steps and now >= steps[0][0]:
                await tab.run(steps.pop(0)[1])
            taken.append(await tab.picture())
            await asyncio.sleep(max(0.0, len(taken) / FPS - (time.monotonic() - began)))
        return taken


def write_gif(file: Path, pictures: list[Image.Image]) -> None:
    """One palette for all, so that what does not change costs nothing."""
    height = round(WIDTH * WINDOW[1] / WINDOW[0])
    small = [picture.resize((WIDTH, height), Image.Resampling.LANCZOS) for picture in pictures]
    sample = Image.new("RGB", (WIDTH, 3 * height))
    for place in range(3):
        sample.paste(small[place * (len(small) - 1) // 2], (0, place * height))
    palette = sample.quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in small]
    frames[0].save(
        file,
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 * SECONDS / len(frames)),
        loop=0,
        optimize=True,
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m docs.make_gif FILE.gif", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "film.webm"
        write_film(clip)
        with Server.open(DEMO_BUNDLE) as server, browser(Path(folder) / "profile") as debugger:
            server.start()
            pictures = asyncio.run(film(debugger, server.page_url, clip))
    file = Path(arguments[0])
    write_gif(file, pictures)
    print(f"{file}: {len(pictures)} pictures, {file.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
