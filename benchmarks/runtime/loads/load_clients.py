"""The clients of `server_load`, a process of their own: light to start, so without torch.

python -m benchmarks.runtime.loads.load_clients viewers|requests ADDRESS SECONDS FOLDER
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import websockets

from edge_vlm_runtime import protocol

VIEWERS, FPS, REQUESTS = 32, 2.0, 32
QUESTION = "What is there now?"
PATIENCE_S = 120.0
"""With a server that gets little of a busy machine."""


async def _viewer(url: str, jpegs: list[bytes], seconds: float, late_s: float) -> dict[str, Any]:
    """Sends frames and reads all that comes."""
    outcomes: Counter[int] = Counter()
    own_ms: list[float] = []
    sent = 0
    news = asyncio.Event()
    await asyncio.sleep(late_s)
    async with websockets.connect(url, compression=None, max_size=None) as line:

        async def read() -> None:
            async for text in line:
                event = json.loads(text)
                if event["type"] in ("frame.accepted", "frame.dropped"):
                    outcomes[event["frame_sequence"]] += 1
                    news.set()
                if event["type"] == "frame.accepted":
                    own_ms.append(event["age_ms"] - sum(event["stage_ms"].values()))

        reading = asyncio.create_task(read())
        begin_s = time.monotonic()
        while sent < round(seconds * FPS):
            now_s = time.monotonic() - begin_s
            frame = protocol.frame_message(sent, round(now_s * 1e6), jpegs[sent % len(jpegs)])
            await line.send(frame.encode())
            sent += 1
            await asyncio.sleep(max(0.0, begin_s + sent / FPS - time.monotonic()))
        with suppress(asyncio.TimeoutError):
            while len(outcomes) < sent:
                news.clear()
                await asyncio.wait_for(news.wait(), PATIENCE_S)
        await line.send('{"type": "session.close"}')
        await asyncio.wait([reading], timeout=PATIENCE_S)
    return {
        "sent": sent,
        "lost": sent - len(outcomes),
        "twice": sum(count > 1 for count in outcomes.values()),
        "own_ms": own_ms,
    }


async def _viewers(url: str, seconds: float, jpegs: list[bytes]) -> dict[str, Any]:
    viewers = [
        _viewer(url, jpegs, seconds, late_s=number / FPS / VIEWERS) for number in range(VIEWERS)
    ]
    seen = await asyncio.gather(*viewers)
    own_ms = sorted(value for viewer in seen for value in viewer["own_ms"])
    return {
        "viewers": VIEWERS,
        "fps_each": FPS,
        "seconds": seconds,
        "sent": sum(viewer["sent"] for viewer in seen),
        "accepted": len(own_ms),
        "lost": sum(viewer["lost"] for viewer in seen),
        "told_twice": sum(viewer["twice"] for viewer in seen),
        "own_ms": {
            "p50": round(own_ms[len(own_ms) // 2], 3),
            "p90": round(own_ms[int(len(own_ms) * 0.90)], 3),
            "p99": round(own_ms[int(len(own_ms) * 0.99)], 3),
            "most": round(own_ms[-1], 3),
        },
    }


async def _requests(url: str, seconds: float, jpegs: list[bytes]) -> dict[str, Any]:
    """So many at once for so long, and then until standard input ends; who is refused comes again
    when it was told to."""
    uris = [f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in jpegs[:8]]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    parts.append({"type": "text", "text": QUESTION})
    body = {"model": "demo", "messages": [{"role": "user", "content": parts}]}
    statuses: Counter[str] = Counter()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def wait_for_the_end() -> None:
        time.sleep(seconds)
        sys.stdin.read()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()

    async def ask(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            try:
                reply = await client.post(f"{url}v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1
                continue
            statuses[str(reply.status_code)] += 1
            if reply.status_code in (429, 503):
                told_s = float(reply.headers["retry-after"])
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stop.wait(), told_s)

    limits = httpx.Limits(max_connections=REQUESTS)
    async with httpx.AsyncClient(timeout=600.0, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(REQUESTS)))
    return {"requests_at_once": REQUESTS, "statuses": dict(statuses)}


def main(argv: Sequence[str]) -> int:
    kind, url, seconds, folder = argv
    jpegs = [file.read_bytes() for file in sorted(Path(folder).iterdir())]
    work = {"viewers": _viewers, "requests": _requests}[kind]
    print(json.dumps(asyncio.run(work(url, float(seconds), jpegs))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
