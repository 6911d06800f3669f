"""What `replay` prints: the lines that `watch` printed, and figures of a run at full speed."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.connection import error_from_detail
from edge_vlm_runtime.client.run import Outcome, PlannedQuestion
from edge_vlm_runtime.client.terminal import LineOutput
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.protocol.alerts import AlertListed, AlertStatus
from edge_vlm_runtime.protocol.questions import lines
from edge_vlm_runtime.recording.replay import Replay, beginning_of, what_came
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.session import Session

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle
    from edge_vlm_runtime.recording.file import Recording


class Report:
    """Shows a replayed session on a view, and counts."""

    def __init__(self, view: LineOutput) -> None:
        self._view = view
        self._asked: list[tuple[str | None, PlannedQuestion]] = []
        self._unasked: list[str] = []
        self._answering: dict[str, PlannedQuestion] = {}
        self.outcome = Outcome()
        self.alerts: list[AlertStatus] = []
        """As they were listed last."""

    def on_message(self, message: protocol.ClientMessage, video_s: float) -> None:
        """What the viewer sent, when the newest picture was that of `video_s` seconds."""
        if isinstance(message, protocol.ConversationItemCreate):
            self._unasked.append(message.item.text)
        elif isinstance(message, protocol.ResponseCreate):
            text = lines([*self._unasked, message.text])
            self._unasked.clear()
            question = PlannedQuestion(text=text, detail=message.detail, at_s=video_s)
            self._asked.append((message.event_id, question))
            self._view.asked(question, video_s)

    def on_event(self, event: protocol.ServerEvent) -> None:
        outcome = self.outcome
        if isinstance(event, protocol.FrameAccepted):
            outcome.frames_processed += 1
            outcome.cells_seen += event.cells_seen
            outcome.cells_kept += event.cells_kept
        elif isinstance(event, protocol.ClipChosen):
            outcome.cells_kept = event.cells_kept
        elif isinstance(event, protocol.FrameDropped):
            outcome.dropped[event.reason] = outcome.dropped.get(event.reason, 0) + 1
        elif isinstance(event, protocol.ResponseCreated):
            question = self._taken(event.event_id)
            if question is not None:
                self._answering[event.response_id] = question
        elif isinstance(event, AlertListed):
            self.alerts = event.alerts
        self._view.event(event)
        if isinstance(event, protocol.ResponseDone) and event.response_id in self._answering:
            question = self._answering.pop(event.response_id)
            outcome.note(event)
            self._view.answered(question, event)
        elif isinstance(event, protocol.Error) and event.error.event_id is not None:
            question = self._taken(event.error.event_id)
            if question is not None:
                error = error_from_detail(event.error)
                outcome.note(error)
                self._view.answered(question, error)

    def _taken(self, event_id: str | None) -> PlannedQuestion | None:
        """The oldest question of this id. Questions are taken up in order."""
        for index, (asked_id, question) in enumerate(self._asked):
            if asked_id == event_id:
                del self._asked[index]
                return question
        return None

    def finish(self, replay: Replay) -> Outcome:
        self.outcome.frames_sent = replay.frames_received
        self.outcome.elapsed_s = replay.elapsed_s
        return self.outcome


# ---- at full speed ---------------------------------------------------------------------------


@dataclass
class Figures:
    """One recording's input, worked on as fast as it goes."""

    frames: int = 0
    frame_bytes: int = 0
    frames_processed: int = 0
    frames_dropped: Counter[str] = field(default_factory=Counter)
    frame_work_s: float = 0.0
    """Time spent on the frames, dropped ones and alerts included."""
    stage_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cells_seen: int = 0
    cells_kept: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    kv_tokens: int = 0
    """Largest cache."""
    answers: int = 0
    answers_recorded: int = 0
    answers_same: int = 0
    resident_bytes: int | None = None
    """Of this process at its largest, engines included."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "frames_dropped": dict(self.frames_dropped),
            "stage_ms": {name: fmean(values) for name, values in self.stage_ms.items()},
            "frames_per_s": self.frames_per_s,
        }

    @property
    def frames_per_s(self) -> float:
        return self.frames / self.frame_work_s if self.frame_work_s > 0 else 0.0

    def lines(self) -> list[str]:
        dropped = ", ".join(f"{count} {why}" for why, count in sorted(self.frames_dropped.items()))
        stages = ", ".join(f"{n} {fmean(v):.2f}" for n, v in self.stage_ms.items())
        kept = self.cells_kept / self.cells_seen if self.cells_seen else 0.0
        size = self.frame_bytes / self.frames if self.frames else 0.0
        lines = [
            f"frames    {self.frames} in, {self.frames_processed} processed, dropped: "
            f"{dropped or 'none'}; at most {self.frames_per_s:.1f} frames/s",
            f"stages    {stages or 'none'} (mean ms)",
            f"cells     {kept:.0%} kept; the cache held {self.kv_tokens} tokens at most",
            f"input     {self.frame_bytes} bytes of pictures, {size / 1e3:.1f} kB each",
            f"answers   {self.answers}, as recorded: {self.answers_same} of "
            f"{self.answers_recorded}",
        ]
        if self.ttft_s:
            rate = f", {median(self.tokens_per_s):.0f} tokens/s" if self.tokens_per_s else ""
            lines.append(
                f"TTFT      median {median(self.ttft_s) * 1e3:.1f} ms, longest "
                f"{max(self.ttft_s) * 1e3:.1f} ms{rate}"
            )
        if self.resident_bytes is not None:
            lines.append(f"memory    {self.resident_bytes / 1e6:.0f} MB resident at most")
        return lines


def measure(engines: LoadedBundle, recording: Recording) -> Figures:
    """Gives a session the recording's frames and messages, each when the last one is done with.

    Raises RecordingError.
    """
    settings, limits, _ = beginning_of(recording)
    figures = Figures()
    answers: dict[str, str] = {}
    recorded: dict[str, str] = {}

    def note(events: list[protocol.ServerEvent]) -> None:
        for event in events:
            _count(figures, event)
            if isinstance(event, protocol.ResponseDone):
                answers[event.response_id] = event.text

    clock_ns = time.monotonic_ns
    session = Session(
        engines=engines,
        settings=settings,
        limits=limits,
        now_ns=clock_ns(),
        stopwatch_ns=clock_ns,
    )
    handle = SessionHandle(session, limits, clock_ns=clock_ns, send=note)
    for item in what_came(recording):
        if isinstance(item, protocol.ResponseDone):
            recorded[item.response_id] = item.text
            continue
        now_ns = clock_ns()
        if isinstance(item, EncodedFrame):
            figures.frames += 1
            figures.frame_bytes += len(item.data)
            handle.put_frame(dataclasses.replace(item, received_ns=now_ns))
        else:
            handle.take(item)
        while handle.step():
            pass
        if isinstance(item, EncodedFrame):
            figures.frame_work_s += (clock_ns() - now_ns) * 1e-9
    handle.close()
    figures.answers = len(answers)
    figures.answers_recorded = len(recorded)
    figures.answers_same = sum(answers.get(name) == text for name, text in recorded.items())
    figures.resident_bytes = peak_resident_bytes()
    return figures


def _count(figures: Figures, event: protocol.ServerEvent) -> None:
    if isinstance(event, protocol.FrameAccepted):
        figures.frames_processed += 1
        figures.cells_seen += event.cells_seen
        figures.cells_kept += event.cells_kept
        figures.kv_tokens = max(figures.kv_tokens, event.kv_tokens)
        for name, value in event.stage_ms.items():
            figures.stage_ms[name].append(value)
    elif isinstance(event, protocol.ClipChosen):
        figures.cells_kept = event.cells_kept
    elif isinstance(event, protocol.FrameDropped):
        figures.frames_dropped[event.reason] += 1
    elif isinstance(event, protocol.ResponseDone):
        figures.kv_tokens = max(figures.kv_tokens, event.kv_tokens)
        if event.ttft_s is not None:
            figures.ttft_s.append(event.ttft_s)
        if event.tokens_per_s is not None:
            figures.tokens_per_s.append(event.tokens_per_s)


def peak_resident_bytes() -> int | None:
    """Largest memory of this process so far, where the platform tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
