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
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, progress, result_head, script_parser, write_result
from benchmarks.runtime.loads.load_clients import QUESTION, REQUESTS, VIEWERS
from benchmarks.runtime.stream_length import pictures
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server

GOAL_OWN_MS, GOAL_TTFT, GOAL_GROWTH = 5.0, 1.15, 0.02
TENTHS = 10
"""Of the time, after which memory is stated; what a session may keep is full by the middle."""


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

    def set_reuse(self, state: Any, rule: Any) -> None:
        self._real.set_reuse(state, rule)

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


def measure_viewers(seconds: float, folder: str) -> dict[str, Any]:
    # the default's 2000 events are more than a viewer is told in 15 minutes
    limits = ServerLimits(max_sessions=VIEWERS, max_replay_events=200)
    with Server(with_idle_engines(), limits=limits) as server:
        gc.collect()
        gc.freeze()  # as `serve` does
        gc.collect()
        server.start()
        resident: list[int] = []
        begin_ns = time.process_time_ns()
        with _process("viewers", server.url, seconds, folder) as clients:
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


def measure_requests(rounds: int, questions: int, folder: str) -> dict[str, Any]:
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
            with _process("requests", server.page_url, 2.0 + questions * 0.5, folder) as clients:
                while server.num_waiting_requests < limits.max_waiting_requests:
                    if clients.poll() is not None:
                        raise RuntimeError("the clients ended before they were told to")
                    time.sleep(0.05)
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


def _process(kind: str, url: str, seconds: float, folder: str) -> subprocess.Popen[str]:
    module = "benchmarks.runtime.loads.load_clients"
    command = [sys.executable, "-m", module, kind, url, str(seconds), folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _result_of(clients: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = clients.communicate(timeout=1200)
    if clients.returncode:
        raise RuntimeError("the clients failed")
    found: dict[str, Any] = json.loads(text)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "server_load.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the viewers")
    parser.add_argument("--rounds", type=int, default=4, help="with requests and without")
    parser.add_argument("--questions", type=int, default=10, help="of each round")
    args: argparse.Namespace = parser.parse_args(argv)
    result = result_head(__file__, argv, torch.device("cpu"))
    progress("viewers")
    with tempfile.TemporaryDirectory() as folder:
        for number, jpeg in enumerate(pictures(128)):
            Path(folder, f"{number:04}.jpg").write_bytes(jpeg)
        result["viewers"] = measure_viewers(args.seconds, folder)
        progress("requests")
        result["requests"] = measure_requests(args.rounds, args.questions, folder)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
