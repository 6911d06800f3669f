"""Eight cameras of the server's own and four viewers on one server, with the demo bundle.

    python -m benchmarks.runtime.cameras_load                        # ten minutes
    python -m benchmarks.runtime.cameras_load --seconds 20 --out small.json

Each camera is a film of moving things, 2 frames a second. Each viewer subscribes to two cameras and
asks; a fifth one wants pictures, too, and never reads. In turn, for as long each, only the first
viewer asks, and all of them ask as fast as they are answered.

Goals: every frame has exactly one outcome; every question is answered, and each viewer gets every
event; the cameras get equal shares of the engines (the least has at least nine tenths of the frames
of the most); the server's memory does not grow (2 %, behind the first fifth of the time). The
time to the first token of the first viewer's answers with the others' against alone is stated
without a goal: they share one set of engines.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import websockets

from benchmarks.harness import RESULTS, progress, result_head, script_parser, write_result
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.demo.paths import DEMO_FOLDER

CAMERAS, VIEWERS, FPS = 8, 4, 2
TURNS = 6
"""Alone, all, alone, ..."""
QUESTION = "What is there now?"
GOAL_GROWTH, GOAL_SHARE = 0.02, 0.9
PATIENCE_S = 120.0
MARGIN_S = 15.0
"""Of film behind the end of what is measured."""


def write_film(path: Path, seconds: float) -> None:
    """The demo clip, over and over."""
    frames = [rgb for _, rgb in read_video(DEMO_FOLDER / "clip.mp4", FPS)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        for number in range(round(seconds * FPS)):
            rgb = np.ascontiguousarray(frames[number % len(frames)])
            for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


class Watched:
    """What one subscription has seen."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.outcomes: Counter[int] = Counter()
        self.accepted = 0
        self.has_begun = asyncio.Event()
        self.dropped: Counter[str] = Counter()
        self.answered = 0
        self.ttft_s: dict[str, list[float]] = {"alone": [], "all": []}
        client.on_event = self._take

    def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            self.outcomes[event.frame_sequence] += 1
            if isinstance(event, protocol.FrameAccepted):
                self.accepted += 1
                self.has_begun.set()
            else:
                self.dropped[event.reason] += 1

    async def ask(self, turn: str) -> None:
        answer = await self.client.ask(QUESTION)
        self.answered += answer.status == "completed"
        if answer.ttft_s is not None:
            self.ttft_s[turn].append(answer.ttft_s)

    @property
    def missing(self) -> int:
        """Frames between the first and the last that was heard of."""
        seen = sorted(self.outcomes)
        return seen[-1] - seen[0] + 1 - len(seen) if seen else 0


def get(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as reply:
        data: bytes = reply.read()
    return data


async def memory_of(address: str) -> float:
    page = (await asyncio.to_thread(get, address, "/metrics")).decode()
    found = re.search(r"^edge_vlm_process_resident_memory_bytes (\S+)", page, re.MULTILINE)
    assert found is not None, page
    return float(found[1])


async def begun(address: str) -> None:
    """Until each camera has its session: the server answers before."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        streams = json.loads(await asyncio.to_thread(get, address, "/v1/streams"))["data"]
        if all(stream["session"] is not None for stream in streams):
            return
        if time.monotonic() > until_s:
            raise TimeoutError("a camera has no session")
        await asyncio.sleep(0.05)


async def keep_asking(watched: Sequence[Watched], turn: str, stop: asyncio.Event) -> int:
    """One question after the other, about each of the cameras in turn; returns how many."""
    asked = 0
    while not stop.is_set():
        asked += 1
        await watched[asked % len(watched)].ask(turn)
        await asyncio.sleep(0.2)
    return asked


async def measure(address: str, seconds: float) -> dict[str, Any]:
    names = [f"camera{number}" for number in range(CAMERAS)]
    await begun(address)
    deaf = await websockets.connect(
        f"ws://{address}/v1/realtime?stream={names[0]}&subscribe_pictures=true", max_queue=1
    )
    watched = [Watched(await Client.subscribe(address, name)) for name in names]
    # Before its first picture there is nothing to ask a camera about.
    await asyncio.gather(*(each.has_begun.wait() for each in watched))
    viewers = [watched[number::VIEWERS] for number in range(VIEWERS)]
    memory: list[float] = []
    questions: Counter[str] = Counter()
    for number in range(TURNS):
        turn = "all" if number % 2 else "alone"
        asking = viewers if turn == "all" else viewers[:1]
        stop = asyncio.Event()
        tasks = [asyncio.create_task(keep_asking(viewer, turn, stop)) for viewer in asking]
        end_s = time.monotonic() + seconds / TURNS  # the answers of the turn before took theirs
        while not stop.is_set():
            await asyncio.sleep(min(seconds / 50, max(0.0, end_s - time.monotonic())))
            memory.append(await memory_of(address))
            if time.monotonic() >= end_s:
                stop.set()
        questions[turn] += sum(await asyncio.gather(*tasks))
        progress(f"turn {number + 1} of {TURNS} ({turn}): {memory[-1] / 1e6:.1f} MB")
    for each in watched:
        await each.client.close()
    deaf.transport.abort()
    settled = memory[len(memory) // 5 :]
    tenth = max(1, len(settled) // 10)
    before, after = statistics.median(settled[:tenth]), statistics.median(settled[-tenth:])
    accepted = [each.accepted for each in watched]
    first = {turn: viewers[0][0].ttft_s[turn] for turn in ("alone", "all")}
    ttft_ms = {turn: statistics.median(v) * 1e3 if v else None for turn, v in first.items()}
    streams = json.loads(await asyncio.to_thread(get, address, "/v1/streams"))["data"]
    result = {
        "cameras": CAMERAS,
        "fps_each": FPS,
        "viewers": VIEWERS,
        "seconds": seconds,
        "frames_seen": sum(len(each.outcomes) for each in watched),
        "frames_accepted": accepted,
        "frames_dropped": [dict(each.dropped) for each in watched],
        "missing": sum(each.missing for each in watched),
        "told_twice": sum(n > 1 for each in watched for n in each.outcomes.values()),
        "questions": dict(questions),
        "ttft_of_first_viewer_ms": ttft_ms,
        "memory_bytes": {"before": before, "after": after, "growth": after / before - 1},
        "states": sorted({stream["state"] for stream in streams}),
    }
    result["goals"] = {
        "each_frame_one_outcome": result["missing"] == result["told_twice"] == 0,
        "all_answered": sum(each.answered for each in watched) == questions.total() > 0,
        "fair": min(accepted) >= GOAL_SHARE * max(accepted),
        "memory_flat": result["memory_bytes"]["growth"] <= GOAL_GROWTH,  # type: ignore[index]
    }
    return result


def serve_and_measure(seconds: float, folder: Path) -> dict[str, Any]:
    """On a server in a process of its own."""
    write_film(folder / "film.mp4", seconds + MARGIN_S)
    tables = [
        f'[[camera]]\nname = "camera{number}"\nsource = "film.mp4"\nfps = {FPS}\n'
        for number in range(CAMERAS)
    ]
    alert = '[[alert]]\nname = "dog"\ncamera = "camera0"\nquestion = "Is there a dog now?"\n'
    (folder / "cameras.toml").write_text("port = 0\n" + "".join(tables) + alert)
    program = Path(sys.executable).parent / "edge-vlm"
    with subprocess.Popen(
        [str(program), "serve", "--config", str(folder / "cameras.toml")],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"//([\d.]+:\d+)/", server.stdout.readline())
            assert found is not None, "the server did not start"
            return asyncio.run(measure(found[1], seconds))
        finally:
            server.send_signal(signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "cameras_load.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="of film that is watched")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = serve_and_measure(args.seconds, Path(folder))
    head = result_head(__file__, argv, torch.device("cpu"))
    write_result(args.out, {**head, **result})
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
