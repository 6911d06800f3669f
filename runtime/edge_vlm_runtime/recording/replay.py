"""Makes the calls of a recorded session again and compares what it says.

The session is given the recorded times, so its events must be the recorded ones, except for the
durations of steps, which are measured anew.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import InternalError, ProtocolError, RecordingError
from edge_vlm.json_text import MALFORMED, parse_json
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.recording.file import Recording
from edge_vlm_runtime.session.calls import Called, FrameCall, MessageCall, perform
from edge_vlm_runtime.session.frames import DroppedFrame, EncodedFrame
from edge_vlm_runtime.session.session import Session

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle

log = logging.getLogger(__name__)

MEASURED = ("stage_ms", "encode_ms")
"""Fields that are measured anew."""
RELATIVE_TOLERANCE = 1e-6
MAX_DIFFERENCES = 10
OnEvent = Callable[[protocol.ServerEvent], None]
OnMessage = Callable[[protocol.ClientMessage, float], None]


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

    def compare(self, recorded: list[str], replayed: list[str]) -> None:
        """Events of one call as JSON texts."""
        self.num_events += len(recorded)
        for was_text, now_text in zip_longest(recorded, replayed):
            if now_text is None:
                self.add(f"{_name(parse_json(was_text))} did not come")
            elif was_text is None:
                self.add(f"{_name(parse_json(now_text))} came, but is not in the recording")
            else:
                self._compare(_comparable(was_text), _comparable(now_text))

    def _compare(self, recorded: dict[str, Any], replayed: dict[str, Any]) -> None:
        if recorded["type"] != replayed["type"]:
            self.add(f"{_name(replayed)} instead of {_name(recorded)}")
            return
        for name in sorted(recorded.keys() | replayed.keys()):
            was, now = recorded.get(name), replayed.get(name)
            if not same(was, now):
                self.add(f"{_name(recorded)}: {name} is {_short(now)}, was {_short(was)}")


class Replay:
    """One recording on engines that its bundle fits."""

    def __init__(
        self,
        engines: LoadedBundle,
        recording: Recording,
        *,
        on_event: OnEvent,
        on_message: OnMessage = lambda message, video_s: None,
    ) -> None:
        """`on_event` gets every event that the session says now; `on_message` every message before
        it is taken up, and the capture time of the frame that had come last when it came, in
        seconds since the first one. Raises RecordingError when the header does not say how the
        session began."""
        self._engines = engines
        self._recording = recording
        self._on_event = on_event
        self._on_message = on_message
        self._settings, self._limits, self._opened_ns = beginning_of(recording)
        self.frames_received = 0
        self.elapsed_s = 0.0
        """Recorded time from the first frame's arrival until now."""

    def run(self) -> Comparison:
        """To the end of the recording. Raises RecordingError where it is damaged, and what making
        the session raises."""
        comparison = Comparison()
        session = Session(
            engines=self._engines,
            settings=self._settings,
            limits=self._limits,
            now_ns=self._opened_ns,
            stopwatch_ns=time.monotonic_ns,
        )
        begin_ns: int | None = None
        for entry in self._recording.entries():
            frame = _frame_of(entry)
            if frame is not None:
                self.frames_received += 1
                begin_ns = frame.received_ns if begin_ns is None else begin_ns
            if isinstance(entry, DroppedFrame):  # by its queue: the session had no part in it
                comparison.num_events += 1
                self._on_event(entry.event())
                continue
            if begin_ns is not None:
                self.elapsed_s = max(0, entry.done_ns - begin_ns) * 1e-9
            if isinstance(entry.call, MessageCall):
                self._on_message(entry.call.message, entry.call.video_s)
            events, has_failed = self._perform(session, entry)
            try:
                comparison.compare(list(entry.events), [protocol.encode(event) for event in events])
            except MALFORMED as error:
                raise _no_events(self._recording, error) from error
            for event in events:
                self._on_event(event)
            if has_failed:
                break
        return comparison

    def _perform(self, session: Session, entry: Called) -> tuple[list[protocol.ServerEvent], bool]:
        """The events, and whether a bug has ended the session."""
        try:
            perform(session, entry.call, entry.now_ns)
        except Exception:  # as it was when it was recorded
            log.exception("the session failed")
            error = InternalError("the session failed", remedy="see the server's log")
            return [*session.events(entry.done_ns), protocol.error_event(error)], True
        return session.events(entry.done_ns), False


def _frame_of(entry: Called | DroppedFrame) -> EncodedFrame | None:
    if isinstance(entry, DroppedFrame):
        return entry.frame
    return entry.call.frame if isinstance(entry.call, FrameCall) else None


def _comparable(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = parse_json(text)
    for part in (fields, fields.get("snapshot")):
        if isinstance(part, dict):
            for name in ("sequence", *MEASURED):
                part.pop(name, None)
    return fields


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
    """Frames and messages of the client in order, and between them the answers they got. Frames
    that could not be read from their message are left out.

    Raises RecordingError where the file is damaged.
    """
    early: list[EncodedFrame] = []  # dropped while older ones still waited
    for entry in recording.entries():
        frame = _frame_of(entry)
        if isinstance(entry, DroppedFrame):
            if entry.reason is not DropReason.DECODE_ERROR:
                early.append(entry.frame)
            continue
        if frame is not None:
            yield from (each for each in early if each.seq < frame.seq)
            early = [each for each in early if each.seq >= frame.seq]
            yield frame
        elif isinstance(entry.call, MessageCall):
            yield entry.call.message
        for text in entry.events:
            try:
                event = protocol.decode_server_event(text)
            except ProtocolError as error:
                raise _no_events(recording, error) from error
            if isinstance(event, protocol.ResponseDone):
                yield event
    yield from early


def _no_events(recording: Recording, error: Exception) -> RecordingError:
    return RecordingError(f"what it says came is no event: {error}", where=recording.path)


def beginning_of(recording: Recording) -> tuple[SessionSettings, ServerLimits, int]:
    """Settings, limits and time with which the session was opened. Raises RecordingError."""
    try:
        header = recording.header
        known = {field.name for field in dataclasses.fields(ServerLimits)}
        limits = ServerLimits(**{n: value for n, value in header["limits"].items() if n in known})
        return SessionSettings(**header["settings"]), limits, int(header["now_ns"])
    except MALFORMED as error:
        raise RecordingError(
            f"the recording's settings are not of this version: {error}", where=recording.path
        ) from error
