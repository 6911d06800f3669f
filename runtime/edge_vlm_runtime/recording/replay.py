"""Does again what a recorded session did: the same work, the same times, the same frames.

The session cannot tell: its clock gives the recorded readings, and frames come into its slot
between the same two looks at it. So its events must be the recorded ones, except for the times that
the vision graphs take, which are measured where no clock is injected.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import EdgeVlmError, FrameDecodeError, InternalError, RecordingError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.worker import deliver
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.recording.file import Event, Inner, Op, Recording, Refused, SlotTouch
from edge_vlm_runtime.session.frame_queue import Dropped, EncodedFrame, FrameQueue
from edge_vlm_runtime.session.session import Session
from edge_vlm_runtime.session.video_feed import Emit, dropped_event

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle

log = logging.getLogger(__name__)

MEASURED = "stage_ms"
"""The field of an event that is measured anew."""
RELATIVE_TOLERANCE = 1e-6
MAX_DIFFERENCES = 10
MAX_ARRIVALS = 256
"""Frames that came between the arrival of a message and the engines' taking it up, at most."""
Told = Callable[[protocol.ClientMessage, float], None]


@dataclass
class Comparison:
    """Recorded events against those of the replay."""

    num_events: int = 0
    """Recorded."""
    num_differences: int = 0
    differences: list[str] = field(default_factory=list)
    """The first few, in words."""

    def add(self, text: str) -> None:
        self.num_differences += 1
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(text)


class Replay:
    """One recording on engines that its bundle fits."""

    def __init__(
        self, engines: LoadedBundle, recording: Recording, *, emit: Emit, told: Told | None = None
    ) -> None:
        """`emit` gets every event that the session says now; `told` every message before it is
        taken up, and the capture time of the frame that had come last when it came, in seconds
        since the first one. Raises RecordingError when the header does not say how the session
        began."""
        self._engines = engines
        self._recording = recording
        self._told = told or (lambda message, capture_s: None)
        self._emit = emit
        self._clock = _RecordedClock()
        self._during: deque[Inner] = deque()
        self._slot: _ReplayedSlot
        self._session: Session | None = None
        self._compared = _Comparer()
        self._first_capture_us: int | None = None
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=MAX_ARRIVALS)
        self.frames_received = 0
        self._settings, self._limits = settings_of(recording)

    def run(self) -> Comparison:
        """To the end of the recording. Raises RecordingError where it is damaged."""
        for entry in self._recording.entries():
            if isinstance(entry, Op):
                self._clock.load(entry.readings_ns)
                self._during = deque(entry.during)
                if not self._work(entry):
                    break
                self._until(None)
            elif isinstance(entry, Event):
                self._compared.recorded(json.loads(entry.text))
            else:
                self._come(entry)
        return self._compared.result()

    def _work(self, op: Op) -> bool:
        """False when the recorded session met a bug, and so did this one."""
        try:
            if op.name == "open":
                self._session = self._open()
            elif self._session is None:
                raise RecordingError("work before the session's begin", where=self._recording.path)
            else:
                self._work_of(self._session, op)
        except EdgeVlmError:
            raise
        except Exception:
            log.exception("the session failed")
            self._say(
                protocol.error_event(
                    InternalError("the session failed", remedy="see the server's log")
                )
            )
            self._until(None)
            for entry in self._recording.entries():
                if isinstance(entry, Event):
                    self._compared.recorded(json.loads(entry.text))
            return False
        return True

    def _open(self) -> Session:
        return Session(
            engines=self._engines,
            settings=self._settings,
            limits=self._limits,
            emit=self._say,
            clock_ns=self._clock,
            make_slot=self._make_slot,
        )

    def _make_slot(self, **arguments: Any) -> FrameQueue:
        self._slot = _ReplayedSlot(self._until, **arguments)
        return self._slot

    def _work_of(self, session: Session, op: Op) -> None:
        if op.name == "answer":
            session.answer()
        elif op.name == "watch":
            session.watch()
        elif op.name == "stats":
            session.emit_stats()
        elif op.name == "close":
            session.close()
        elif op.name == "message" and op.message is not None and op.received_ns is not None:
            message = protocol.decode_client_message(op.message)
            self._told(message, self._capture_s_at(op.received_ns))
            deliver(session, message, op.received_ns, self._say)
        else:
            raise RecordingError(f"unknown work {op.name!r}", where=self._recording.path)

    def _until(self, what: str | None) -> None:
        """Lets happen what happened before this touch of the slot; None: before the work ended."""
        while self._during:
            inner = self._during.popleft()
            if isinstance(inner, SlotTouch):
                if inner.what == what:
                    return
            elif isinstance(inner, Event):
                self._compared.recorded(json.loads(inner.text))
            else:
                self._come(inner)

    def _come(self, entry: EncodedFrame | Refused) -> None:
        """A frame arrives."""
        self.frames_received += 1
        frame = entry.frame if isinstance(entry, Refused) else entry
        self._clock.begin(frame.received_ns)
        if self._first_capture_us is None:
            self._first_capture_us = frame.capture_time_us
        capture_s = (frame.capture_time_us - self._first_capture_us) * 1e-6
        self._arrivals.append((frame.received_ns, capture_s))
        error: EdgeVlmError | None = None
        if isinstance(entry, Refused):
            dropped = self._slot.refuse(entry.frame, DropReason.DECODE_ERROR)
            error = FrameDecodeError(entry.message)
        else:
            dropped = self._slot.put(entry)
        for frame, reason in dropped:
            self._say(dropped_event(frame, reason, error))

    def _capture_s_at(self, now_ns: int) -> float:
        """Of the last frame that had come by then."""
        found = [capture_s for arrived_ns, capture_s in self._arrivals if arrived_ns <= now_ns]
        return found[-1] if found else 0.0

    def _say(self, event: protocol.ServerEvent) -> None:
        self._compared.replayed(json.loads(protocol.encode(event)))
        self._emit(event)

    @property
    def elapsed_s(self) -> float:
        """Recorded time from the first frame's arrival until now."""
        return self._clock.elapsed_s


class _RecordedClock:
    """Gives the readings of the work under way in order, the last one again and again."""

    def __init__(self) -> None:
        self._readings_ns: deque[int] = deque()
        self._begin_ns: int | None = None
        self._last_ns = 0

    def load(self, readings_ns: list[int]) -> None:
        self._readings_ns = deque(readings_ns)

    def begin(self, now_ns: int) -> None:
        """The first frame came at this time; later calls do nothing."""
        if self._begin_ns is None:
            self._begin_ns = now_ns

    @property
    def elapsed_s(self) -> float:
        return 0.0 if self._begin_ns is None else max(0, self._last_ns - self._begin_ns) * 1e-9

    def __call__(self) -> int:
        if self._readings_ns:
            self._last_ns = self._readings_ns.popleft()
        return self._last_ns


class _ReplayedSlot(FrameQueue):
    """Before each look at it, what had come by then comes."""

    def __init__(self, until: Callable[[str | None], None], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._until = until

    def take(self) -> EncodedFrame | None:
        self._until("take")
        return super().take()

    def __len__(self) -> int:
        self._until("len")
        return super().__len__()

    def counts(self) -> tuple[int, dict[str, int]]:
        self._until("counts")
        return super().counts()

    def empty(self) -> list[Dropped]:
        self._until("empty")
        return super().empty()


class _Comparer:
    """Pairs recorded and replayed events as they come.

    Frames that are turned away on arrival are told by another thread than the rest, so when a
    `frame.dropped` came is not part of what must be the same: those are paired by their frame.
    """

    def __init__(self) -> None:
        self._result = Comparison()
        self._recorded: dict[int | None, deque[dict[str, Any]]] = {}
        self._replayed: dict[int | None, deque[dict[str, Any]]] = {}

    def recorded(self, event: dict[str, Any]) -> None:
        self._result.num_events += 1
        self._add(event, self._recorded, self._replayed)

    def replayed(self, event: dict[str, Any]) -> None:
        self._add(event, self._replayed, self._recorded)

    def _add(
        self,
        event: dict[str, Any],
        side: dict[int | None, deque[dict[str, Any]]],
        other: dict[int | None, deque[dict[str, Any]]],
    ) -> None:
        event.pop("sequence", None)
        event.pop(MEASURED, None)
        lane = event["frame_sequence"] if event["type"] == "frame.dropped" else None
        if lane not in other:
            side.setdefault(lane, deque()).append(event)
            return
        partner = other[lane].popleft()
        if not other[lane]:
            del other[lane]
        if side is self._recorded:
            self._compare(event, partner)
        else:
            self._compare(partner, event)

    def _compare(self, recorded: dict[str, Any], replayed: dict[str, Any]) -> None:
        if recorded["type"] != replayed["type"]:
            self._result.add(f"{_name(replayed)} instead of {_name(recorded)}")
            return
        for name in sorted(recorded.keys() | replayed.keys()):
            was, now = recorded.get(name), replayed.get(name)
            if not same(was, now):
                self._result.add(f"{_name(recorded)}: {name} is {_short(now)}, was {_short(was)}")

    def result(self) -> Comparison:
        for event in itertools.chain.from_iterable(self._recorded.values()):
            self._result.add(f"{_name(event)} did not come")
        for event in itertools.chain.from_iterable(self._replayed.values()):
            self._result.add(f"{_name(event)} came, but is not in the recording")
        return self._result


def same(one: Any, other: Any) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(one, float) or isinstance(other, float):
        return (
            isinstance(one, (int, float))
            and isinstance(other, (int, float))
            and math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def _name(event: dict[str, Any]) -> str:
    number = event.get("frame_sequence") or event.get("response_id") or event.get("alert_id")
    return event["type"] if number is None else f"{event['type']} {number}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def what_came(
    recording: Recording,
) -> Iterator[EncodedFrame | protocol.ClientMessage | protocol.ResponseDone]:
    """Frames and messages of the client in order, and between them the answers they got.

    Raises RecordingError where the file is damaged.
    """
    for entry in recording.entries():
        parts: list[Inner] = [entry] if not isinstance(entry, Op) else entry.during
        if isinstance(entry, Op) and entry.message is not None:
            yield protocol.decode_client_message(entry.message)
        for part in parts:
            if isinstance(part, EncodedFrame):
                yield part
            elif isinstance(part, Event):
                event = protocol.decode_server_event(part.text)
                if isinstance(event, protocol.ResponseDone):
                    yield event


def settings_of(recording: Recording) -> tuple[SessionSettings, ServerLimits]:
    """How the session began. Raises RecordingError."""
    try:
        fields = recording.header["limits"]
        known = {field.name for field in dataclasses.fields(ServerLimits)}
        limits = ServerLimits(**{name: value for name, value in fields.items() if name in known})
        return SessionSettings(**recording.header["settings"]), limits
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordingError(
            f"the recording's settings are not of this version: {error}", where=recording.path
        ) from error
