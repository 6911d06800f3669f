"""The figures of a running stream, for a table that is drawn again and again."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable

from edge_vlm_runtime import protocol

HISTORY = 12
"""Frames over which rates are averaged."""
NOTHING = "-"


class LiveGauges:
    """Counts what is sent and what the server says."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._sent_s: deque[float] = deque(maxlen=HISTORY)
        self._accepted: deque[protocol.FrameAccepted] = deque(maxlen=HISTORY)
        self._accepted_s = 0.0
        self._num_sent = 0
        self._num_accepted = 0
        self._dropped: Counter[str] = Counter()
        self._stats: protocol.SessionStats | None = None
        self._done: protocol.ResponseDone | None = None

    def sent(self) -> None:
        """A picture was sent."""
        self._num_sent += 1
        self._sent_s.append(self._clock_s())

    def event(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self._num_accepted += 1
            self._accepted.append(event)
            self._accepted_s = self._clock_s()
        elif isinstance(event, protocol.FrameDropped):
            self._dropped[event.reason] += 1
        elif isinstance(event, protocol.SessionStats):
            self._stats = event
        elif isinstance(event, protocol.ResponseDone) and event.ttft_s is not None:
            self._done = event

    @property
    def newest(self) -> protocol.FrameAccepted | None:
        """The last frame that was processed."""
        return self._accepted[-1] if self._accepted else None

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each, in the order of a frame's way."""
        stats = self._stats
        memory_bytes = None if stats is None else stats.memory_bytes
        watts = None if stats is None else stats.power_watts
        return [
            ("fps in", f"{self._rate():.1f}"),
            ("processed", self._processed(stats)),
            ("dropped", _counted(self._dropped) or "none"),
            ("cells kept", self._kept()),
            ("frame age", self._age()),
            ("TTFT", self._of_answer(lambda done: f"{(done.ttft_s or 0.0) * 1e3:.0f} ms")),
            ("tokens/s", self._of_answer(_speed)),
            ("KV", self._cache(stats)),
            ("memory", _gauge(memory_bytes, lambda value: f"{value / 2**20:.0f} MiB")),
            ("power", _gauge(watts, lambda value: f"{value:.1f} W")),
        ]

    def _rate(self) -> float:
        """Pictures a second that the source gives now; it falls when no more come."""
        if len(self._sent_s) < 2:
            return 0.0
        gap_s = (self._sent_s[-1] - self._sent_s[0]) / (len(self._sent_s) - 1)
        silent_s = self._clock_s() - self._sent_s[-1]
        slowest_s = max(gap_s, silent_s - gap_s)
        return 1.0 / slowest_s if slowest_s > 0 else 0.0

    def _processed(self, stats: protocol.SessionStats | None) -> str:
        counted = f"{self._num_accepted} of {self._num_sent}"
        return counted if stats is None else f"{counted}, {stats.fps_processed:.1f} a second"

    def _kept(self) -> str:
        seen = sum(event.cells_seen for event in self._accepted)
        kept = sum(event.cells_kept for event in self._accepted)
        return f"{kept / seen:.0%} of the last {len(self._accepted)}" if seen else NOTHING

    def _age(self) -> str:
        """Of what the model knows: since the newest frame arrived, as long as no newer one does."""
        if not self._accepted:
            return NOTHING
        age_s = self._accepted[-1].age_ms * 1e-3 + self._clock_s() - self._accepted_s
        return f"{age_s * 1e3:.0f} ms" if age_s < 1.0 else f"{age_s:.1f} s"

    def _of_answer(self, show: Callable[[protocol.ResponseDone], str]) -> str:
        return NOTHING if self._done is None else show(self._done)

    def _cache(self, stats: protocol.SessionStats | None) -> str:
        if stats is not None:
            frames = f", {stats.frames_in_memory} frames"
            return f"{stats.kv_tokens} / {stats.kv_capacity_tokens} tokens{frames}"
        newest = self.newest
        return NOTHING if newest is None else f"{newest.kv_tokens} tokens"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _speed(done: protocol.ResponseDone) -> str:
    return NOTHING if done.tokens_per_s is None else f"{done.tokens_per_s:.0f}"


def _gauge(value: float | None, show: Callable[[float], str]) -> str:
    return NOTHING if value is None else show(value)
