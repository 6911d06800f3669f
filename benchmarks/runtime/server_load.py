"""What a server bears: many viewers at once, and many HTTP requests beside a live one.

    python -m benchmarks.runtime.server_load                             # six minutes
    python -m benchmarks.runtime.server_load --seconds 20 --rounds 2 --out small.json

1. 32 viewers at 2 frames a second on the loopback, engines that compute nothing: is there an
   outcome for every frame, what of a frame's age is the server's own (all but the stages of its
   work), does its memory grow? Goals: none lost, 99 of 100 under 5 ms, no growth.
2. 32 HTTP requests at once, over and over, beside a live session that asks: the time to its first
   token with them and without, in turn. Goal: at most 1.15 times; every request is answered, by 200
   or by 429 with a time to come back.

The clients are processes of their own, on the same machine: with fewer idle processors than two,
part of what is measured is waiting for one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import websockets

from benchmarks.harness import RESULTS, progress, result_head, script_parser, write_result
from benchmarks.runtime.stream_length import pictures
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server

VIEWERS, FPS, REQUESTS = 32, 2.0, 32
GOAL_OWN_MS, GOAL_TTFT, GOAL_GROWTH = 5.0, 1.15, 0.02
QUESTION = "What is there now?"
TENTHS = 10
"""Of the time, after which memory is stated; what a session may keep is full by the middle."""
PART = "--as-clients"


# ---- 1: many viewers -------------------------------------------------------------------------


class IdleVision:
    """Keeps what a policy keeps of scores that are always the same."""

    def __init__(self, engines: LoadedBundle) -> None:
        self._real = engines.vision
        self.num_cells = engines.vision.num_cells
        self._width = engines.bundle.config.language.width
        self._scores = np.linspace(0.0, 1.0, self.num_cells, dtype=np.float32)

    def new_state(self) -> Any:
        return self._real.new_state()

    def encode(self, frame: Any, state: Any, policy: Any) -> FrameTokens:
        cells = policy.select(self._scores, frame.rgb, state.is_first)
        state.is_first = False
        return FrameTokens(
            embeds=np.zeros((len(cells), self._width), np.float32),
            cells=cells,
            scores=self._scores,
            pts_ns=frame.pts_ns,
            seq=frame.seq,
            stage_ms={},
        )


def with_idle_engines() -> LoadedBundle:
    """The demo bundle; its graphs are never run by a session."""
    engines = LoadedBundle.open(DEMO_BUNDLE, 1)
    warm_up(engines)
    language = engines.language
    logits = np.zeros((1, engines.bundle.config.language.base_vocab), np.float32)
    setattr(engines, "vision", IdleVision(engines))  # noqa: B010 - it only looks like one
    setattr(language, "_infer", lambda *arguments: logits)  # noqa: B010
    return engines


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
        while (now_s := time.monotonic() - begin_s) < seconds:
            frame = protocol.frame_message(sent, round(now_s * 1e6), jpegs[sent % len(jpegs)])
            await line.send(frame.encode())
            sent += 1
            await asyncio.sleep(max(0.0, begin_s + sent / FPS - time.monotonic()))
        with suppress(asyncio.TimeoutError):
            while len(outcomes) < sent:
                news.clear()
                await asyncio.wait_for(news.wait(), 10.0)
        await line.send('{"type": "session.close"}')
        await asyncio.wait([reading], timeout=10.0)
    return {
        "sent": sent,
        "lost": sent - len(outcomes),
        "twice": sum(count > 1 for count in outcomes.values()),
        "own_ms": own_ms,
    }


async def _viewers(url: str, seconds: float) -> dict[str, Any]:
    jpegs = pictures(128)
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


def measure_viewers(seconds: float) -> dict[str, Any]:
    limits = ServerLimits(max_sessions=VIEWERS)
    with Server(with_idle_engines(), limits=limits) as server:
        server.start()
        _clients("viewers", server.url, 3.0)  # once around: what is made on first use is there
        resident: list[int] = []
        begin_ns = time.process_time_ns()
        with _process("viewers", server.url, seconds) as clients:
            while clients.poll() is None:
                resident.append(_resident_bytes())
                time.sleep(0.5)
            found = _result_of(clients)
        took_ms = (time.process_time_ns() - begin_ns) * 1e-6
    found["processor_ms_per_frame"] = round(took_ms / found["sent"], 3)
    steps = [resident[len(resident) * step // TENTHS] for step in range(TENTHS)] + resident[-1:]
    found["resident_mb_by_tenths"] = [round(value / 1e6, 1) for value in steps]
    before, after = steps[TENTHS // 2], steps[-1]
    found["goals"] = {
        "none_lost": found["lost"] == 0 and found["told_twice"] == 0,
        "p99_ms": found["own_ms"]["p99"] <= GOAL_OWN_MS,
        "flat": after <= (1 + GOAL_GROWTH) * before,
    }
    return found


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---- 2: HTTP beside a live session -----------------------------------------------------------


async def _requests(url: str, seconds: float) -> dict[str, Any]:
    """So many at once for so long; who is refused comes again when it was told to."""
    uris = [
        f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in pictures(128)[:8]
    ]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    parts.append({"type": "text", "text": QUESTION})
    body = {"model": "demo", "messages": [{"role": "user", "content": parts}]}
    statuses: Counter[str] = Counter()
    stop_s = time.monotonic() + seconds

    async def ask(client: httpx.AsyncClient) -> None:
        while time.monotonic() < stop_s:
            try:
                reply = await client.post(f"{url}v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1
                continue
            statuses[str(reply.status_code)] += 1
            if reply.status_code in (429, 503):
                told_s = float(reply.headers["retry-after"])
                await asyncio.sleep(min(told_s, max(0.0, stop_s - time.monotonic())))

    limits = httpx.Limits(max_connections=REQUESTS)
    async with httpx.AsyncClient(timeout=600.0, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(REQUESTS)))
    return {"requests_at_once": REQUESTS, "statuses": dict(statuses)}


async def _ttft(url: str, questions: int) -> list[float]:
    """Of a live session that is asked again and again."""
    found = []
    async with await Client.connect(url, {"delivery": "wait"}) as client:
        for number, jpeg in enumerate(pictures(128)[:8]):
            await client.send_frame(jpeg, number * 500_000)
        await client.wait_processed()
        for _ in range(questions):
            found.append((await client.ask(QUESTION)).ttft_s or 0.0)
            await asyncio.sleep(0.1)
    return found


def measure_requests(rounds: int, questions: int) -> dict[str, Any]:
    alone: list[float] = []
    beside: list[float] = []
    statuses: Counter[str] = Counter()
    limits = ServerLimits(max_waiting_requests=REQUESTS // 2)
    with Server.open(DEMO_BUNDLE, threads=1, limits=limits) as server:
        server.start()
        asyncio.run(_ttft(server.url, 3))
        for number in range(rounds):
            progress(f"requests: round {number + 1} of {rounds}")
            alone += asyncio.run(_ttft(server.url, questions))
            with _process("requests", server.page_url, 2.0 + questions * 0.5) as clients:
                time.sleep(1.5)
                beside += asyncio.run(_ttft(server.url, questions))
                statuses.update(_result_of(clients)["statuses"])
    ratio = statistics.median(beside) / statistics.median(alone)
    return {
        "requests_at_once": REQUESTS,
        "statuses": dict(statuses),
        "live_ttft_ms": {
            "alone": round(1e3 * statistics.median(alone), 2),
            "beside_requests": round(1e3 * statistics.median(beside), 2),
            "questions_each": len(alone),
        },
        "ratio": round(ratio, 3),
        "goals": {
            "ttft": ratio <= GOAL_TTFT,
            "all_answered": set(statuses) <= {"200", "429"},
        },
    }


# ---- the clients' process --------------------------------------------------------------------


def _process(kind: str, url: str, seconds: float) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.runtime.server_load",
        PART,
        kind,
        url,
        str(seconds),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _result_of(clients: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = clients.communicate(timeout=1200)
    if clients.returncode:
        raise RuntimeError("the clients failed")
    found: dict[str, Any] = json.loads(text)
    return found


def _clients(kind: str, url: str, seconds: float) -> dict[str, Any]:
    with _process(kind, url, seconds) as clients:
        return _result_of(clients)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [PART]:
        _, kind, url, seconds = arguments
        work = {"viewers": _viewers, "requests": _requests}[kind]
        print(json.dumps(asyncio.run(work(url, float(seconds)))))
        return 0
    parser = script_parser(__doc__, RESULTS / "server_load.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the viewers")
    parser.add_argument("--rounds", type=int, default=4, help="with requests and without")
    parser.add_argument("--questions", type=int, default=10, help="of each round")
    args: argparse.Namespace = parser.parse_args(arguments)
    result = result_head(__file__, argv, torch.device("cpu"))
    progress("viewers")
    result["viewers"] = measure_viewers(args.seconds)
    result["requests"] = measure_requests(args.rounds, args.questions)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
