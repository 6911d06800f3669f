"""A live stream at a steady rate, through a real session: how far it lags, and what is dropped.

A picture's lag is from its capture, the moment when it was due, to the event that says it is in the
model's memory.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from statistics import fmean
from typing import Any, Protocol

from edge_vlm.errors import RequestTimeout
from edge_vlm.pixels.frames import Rgb, encode_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.bench.links import Link, Told
from edge_vlm_runtime.bench.samples import Series
from edge_vlm_runtime.bench.stages import Step
from edge_vlm_runtime.bench.workload import MAX, QUESTION, Workload, rate_name
from edge_vlm_runtime.protocol.settings import DropPolicy
from edge_vlm_runtime.protocol.typed import Settings

OUTCOME_S = 300.0
"""That a picture or an answer may take, on the slowest of machines."""
LOOK_S = 0.5
"""How often a wait looks whether its session is still there."""
FAST = 1000.0
"""Pictures a second that a session takes at most where it is not to hold anything back."""
QUESTIONS = 20


class Sessions(Protocol):
    """`links.Engines` or `links.Served`."""

    path: str

    def open(self, settings: Settings, told: Told) -> Link: ...


class Outcomes:
    """What became of the pictures and questions of one session."""

    def __init__(self) -> None:
        self.due_ns: dict[int, int] = {}
        self.lag_ms = Series()
        self.stages_ms: list[tuple[int, dict[str, float]]] = []
        """Cells kept and milliseconds by stage, of each picture."""
        self.cells_seen = self.cells_kept = self.processed = self.later = self.kv_tokens = 0
        self.shares_recomputed: list[float] = []
        self.dropped: Counter[str] = Counter()
        self.answers: list[protocol.ResponseDone] = []
        self.failures = 0
        self._sent = 0
        self.done_ns = 0
        self._change = threading.Condition()

    def told(self, now_ns: int, event: protocol.ServerEvent) -> None:
        with self._change:
            if isinstance(event, protocol.FrameAccepted):
                self._accept(now_ns, event)
            elif isinstance(event, protocol.FrameDropped):
                self.due_ns.pop(event.frame_sequence, None)
                self.dropped[event.reason] += 1
            elif isinstance(event, protocol.ResponseDone):
                self.answers.append(event)
            elif isinstance(event, protocol.Error):
                self.failures += 1
            self._change.notify_all()

    def _accept(self, now_ns: int, event: protocol.FrameAccepted) -> None:
        due_ns = self.due_ns.pop(event.frame_sequence, None)
        self.processed += 1
        self.cells_seen += event.cells_seen
        self.cells_kept += event.cells_kept
        self.shares_recomputed.append(event.share_recomputed)
        self.kv_tokens = max(self.kv_tokens, event.kv_tokens)
        self.stages_ms.append((event.cells_kept, event.stage_ms))
        self.done_ns = now_ns
        if not event.in_memory:
            self.later += 1
        elif due_ns is not None:
            self.lag_ms.add((now_ns - due_ns) * 1e-6)

    def expect(self, link: Link, jpeg: bytes, due_ns: int) -> None:
        """Sends a picture that was due then, when the session may take one more."""
        self.until(link, lambda: len(self.due_ns) < link.most_waiting)
        self._sent += 1  # links count from 1; the outcome may come before `send` returns
        with self._change:
            self.due_ns[self._sent] = due_ns
        link.send(jpeg, due_ns // 1000)

    def until(self, link: Link, is_met: Any) -> None:
        """Raises what ended the session, RequestTimeout."""
        end = time.monotonic() + OUTCOME_S
        while True:
            with self._change:
                if self._change.wait_for(is_met, LOOK_S):
                    return
            link.check()  # without the lock, which whoever tells of an event takes
            if time.monotonic() > end:
                raise RequestTimeout(f"nothing came of it within {OUTCOME_S:.0f} s")


class StreamBench:
    """Each rate in a session of its own, then questions to one that remembers a stream."""

    def __init__(self, sessions: Sessions, workload: Workload, pictures: Sequence[Rgb]) -> None:
        self._sessions, self._workload = sessions, workload
        self._jpegs = cycle([encode_jpeg(picture) for picture in pictures])
        self._points: list[tuple[float, Outcomes, float, int]] = []
        self._asked: Outcomes | None = None

    def run(self, step: Step) -> None:
        for rate in self._workload.rates:
            step(f"a stream of {rate_name(rate)} frames/s")
            self._stream(rate)
        step("questions to a stream")
        self._ask()

    def _settings(self, rate: float) -> Settings:
        settings: Settings = {"delivery": DropPolicy.LIVE, "fps_cap": FAST}
        if rate == MAX:
            settings = {"delivery": DropPolicy.WAIT, "drop_duplicates": False}
        if self._workload.reuse:
            settings["reuse"] = self._workload.reuse
        return settings

    def _stream(self, rate: float) -> None:
        outcomes = Outcomes()
        link = self._sessions.open(self._settings(rate), outcomes.told)
        begin_ns = time.monotonic_ns()
        sent = 0
        try:
            while True:
                now_ns = time.monotonic_ns()
                due_ns = now_ns if rate == MAX else begin_ns + int(sent * 1e9 / rate)
                if max(now_ns, due_ns) - begin_ns > self._workload.stream_s * 1e9 and sent:
                    break
                if due_ns > now_ns:
                    time.sleep((due_ns - now_ns) * 1e-9)
                outcomes.expect(link, next(self._jpegs), due_ns)
                sent += 1
            outcomes.until(link, lambda: not outcomes.due_ns)
        finally:
            self._points.append((rate, outcomes, (time.monotonic_ns() - begin_ns) * 1e-9, sent))
            link.close()

    def _ask(self) -> None:
        outcomes = self._asked = Outcomes()
        settings: Settings = {"delivery": DropPolicy.WAIT, "drop_duplicates": False}
        link = self._sessions.open(settings, outcomes.told)
        try:
            for index in range(16):
                outcomes.expect(link, next(self._jpegs), time.monotonic_ns() + index * 500_000_000)
            outcomes.until(link, lambda: not outcomes.due_ns)
            begin = time.monotonic()
            for index in range(QUESTIONS):
                link.ask(QUESTION)
                outcomes.until(link, lambda n=index: len(outcomes.answers) + outcomes.failures > n)
                if index >= 2 and time.monotonic() - begin > self._workload.stream_s:
                    break
        finally:
            link.close()

    @property
    def outcomes(self) -> list[Outcomes]:
        return [point[1] for point in self._points]

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self._sessions.path,
            "rates": [_point(*point) for point in self._points],
            "session": None if self._asked is None else _session(self._asked),
        }


def _point(rate: float, outcomes: Outcomes, seconds: float, sent: int) -> dict[str, Any]:
    seen = outcomes.cells_seen
    span_s = seconds if rate == MAX else max(seconds, sent / rate)  # the last one has its time too
    return {
        "rate": rate_name(rate),
        "seconds": round(seconds, 2),
        "sent": sent,
        "processed": outcomes.processed,
        "dropped": dict(outcomes.dropped),
        "without_outcome": len(outcomes.due_ns),
        "in_memory_later": outcomes.later,
        "kept_share": round(outcomes.cells_kept / seen, 3) if seen else None,
        "recomputed_share": round(fmean(outcomes.shares_recomputed), 3)
        if outcomes.shares_recomputed
        else None,
        "kv_tokens": outcomes.kv_tokens,
        "processed_per_s": round(outcomes.processed / span_s, 2) if span_s > 0 else None,
        "lag_ms": outcomes.lag_ms.summary(),
    }


def _session(outcomes: Outcomes) -> dict[str, Any]:
    ttft, rate = Series(), Series()
    for answer in outcomes.answers:
        if answer.ttft_s is not None:
            ttft.add(answer.ttft_s * 1e3)
        if answer.tokens_per_s is not None:
            rate.add(answer.tokens_per_s)
    tokens = [answer.usage.output_tokens for answer in outcomes.answers]
    return {
        "questions": len(outcomes.answers),
        "failed": outcomes.failures,
        "kv_tokens": outcomes.kv_tokens,
        "answer_tokens": round(fmean(tokens), 1) if tokens else None,
        "ttft_ms": ttft.summary(),
        "tokens_per_s": rate.summary(),
    }
