"""A well-behaved viewer of this process: what it was told while something else broke."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from benchmarks.runtime.fault_parts.client import QUESTION, alert_key
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.protocol.typed import Settings

SETTINGS: Settings = {"delivery": "wait", "drop_duplicates": False, "max_answer_tokens": 8}
STEP_S = 0.05


class SteadyViewer:
    """Shows pictures, sets and removes alerts and asks, over and over, until it is left."""

    def __init__(self, address: str, jpegs: Sequence[bytes]) -> None:
        self._address, self._jpegs = address, jpegs
        self.told: dict[str, float] = {}
        """Alert events, and when."""
        self.outcomes: Counter[int] = Counter()
        self.sent = 0
        self.asked = 0
        self.answers: list[tuple[float, float]] = []
        """When each was whole, and how long it took, in seconds."""

    async def __aenter__(self) -> SteadyViewer:
        self.client = await Client.connect(self._address, SETTINGS)
        self.client.on_event = self._take
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._go_on())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        await self._task
        if error is None:
            await self.client.wait_processed()
        await self.client.close()

    def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, (AlertTriggered, AlertCleared)):
            key = alert_key(self.client.resume_point.session_id, event)
            self.told[key] = time.time()
        elif isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            self.outcomes[event.frame_sequence] += 1

    async def _go_on(self) -> None:
        client = self.client
        while not self._stop.is_set():
            await client.send_frame(self._jpegs[self.sent % len(self._jpegs)])
            self.sent += 1
            alert = await client.create_alert(QUESTION, on_threshold=1e-6, off_threshold=1e-7)
            begun = time.monotonic()
            self.asked += 1
            answer = await client.ask(QUESTION)
            if answer.status == "completed":
                self.answers.append((time.monotonic(), time.monotonic() - begun))
            await client.delete_alert(alert.alert_id)
            await asyncio.sleep(STEP_S)

    async def goes_on(self, turns: int, timeout_s: float = 60.0) -> None:
        """Returns when so many more questions were answered. Raises TimeoutError, and what ended
        the viewer."""
        wanted, until_s = len(self.answers) + turns, time.monotonic() + timeout_s
        while len(self.answers) < wanted:
            if self._task.done():
                self._task.result()
            if time.monotonic() > until_s:
                raise TimeoutError(f"a viewer got no {turns} answers within {timeout_s:g} s")
            await asyncio.sleep(0.01)

    def answer_ms(self, since_s: float, until_s: float = float("inf")) -> float | None:
        """The median of answers in that time of the monotonic clock."""
        took = [took for at, took in self.answers if since_s <= at < until_s]
        return round(1e3 * statistics.median(took), 1) if took else None

    def report(self) -> dict[str, Any]:
        return {
            "frames": self.sent,
            "frames_without_one_outcome": self.sent
            - sum(self.outcomes[number] == 1 for number in range(1, self.sent + 1)),
            "asked": self.asked,
            "answered": len(self.answers),
            "alerts_told": len(self.told),
        }
