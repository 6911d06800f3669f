"""One session as the server keeps it: its events' log, and who listens. Lives on the event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge_vlm.errors import FrameDecodeError, SessionGone
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.openai.realtime import RealtimeShape
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertListed, AlertTriggered
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.server.event_log import EventLog
from edge_vlm_runtime.server.live_view import LiveView
from edge_vlm_runtime.server.streams.requests import Reply, request
from edge_vlm_runtime.session.frames import EncodedFrame

log = logging.getLogger(__name__)

OnEvent = Callable[[str, protocol.ServerEvent], None]
AlertEvent = (AlertTriggered, AlertCleared)


class Subscriber(Protocol):
    """A connection that reads a session's log."""

    def wake(self) -> None:
        """There is something new in the log, or the session has ended."""

    def displace(self) -> None:
        """Another connection has taken the session over."""


@dataclass(frozen=True)
class CloseReason:
    """How the last connection is to be closed, after the last event."""

    code: int
    reason: str


class ClientSession:
    """One session as the server keeps it. Made by `SessionRegistry.open`."""

    def __init__(
        self,
        limits: ServerLimits,
        on_event: OnEvent | None = None,
        model_id: str = "",
        clock_ns: Callable[[], int] = time.monotonic_ns,
        camera: str | None = None,
    ) -> None:
        """`camera`: the one of the server's that it belongs to; it has no viewer then, and its log
        stays empty: whoever wants its events listens."""
        self.camera = camera
        self.has_ended = asyncio.Event()
        self._on_event = on_event
        self._clock_ns = clock_ns
        self.session_id = secrets.token_hex(8)
        self.shape = RealtimeShape(self.session_id, model_id)
        self.resume_token = secrets.token_urlsafe(24)
        self.log = EventLog(max_events=limits.max_replay_events, max_bytes=limits.max_replay_bytes)
        self.handle: SessionHandle | None = None
        """None before the engines have it, and after they gave it up."""
        self.ending: CloseReason | None = None
        """Set when there will be no more events."""
        self.viewer: Subscriber | None = None
        self.progress = asyncio.Event()
        """Set whenever the engines have done something, and at the end."""
        self.listeners: set[Callable[[protocol.ServerEvent | None], None]] = set()
        """Get every event as well, and None at the end."""
        self._stranger_ids = f"http_{secrets.token_hex(4)}_"
        self._num_strangers = 0
        self.view = LiveView()
        self.settings: SessionSettings | None = None
        """Those last announced."""
        self.messages_received = 0
        """Messages of the client that were taken in, over all its connections..."""
        self.taking: asyncio.Task[None] | None = None
        """...and the last of them, which may still wait for something."""
        self.newest_frame_sequence: int | None = None
        self.stills_under_way: set[int] = set()
        """Numbers of pictures of the conversation without outcome: a question waits for them."""
        self.newest_time: tuple[int, int] | None = None
        """Capture time in microseconds of the newest frame, and when it came, in nanoseconds."""
        self.heard_ns = clock_ns()
        """When its viewer or somebody else last showed or asked something."""
        self.left_at_s = 0.0
        """When the viewer was last seen, by the event loop's clock."""

    def send_all(self, events: list[protocol.ServerEvent]) -> None:
        """The engines have done something, and this is what came of it."""
        self.progress.set()
        for event in events:
            self.send(event)

    def send(self, event: protocol.ServerEvent) -> None:
        """The next event. While nobody is connected, gauges are not worth keeping."""
        if self.ending is not None:
            return
        if self.camera is not None and isinstance(event, AlertEvent):
            event.camera = self.camera
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            self.stills_under_way.discard(event.frame_sequence)
        self.view.said(event, self._clock_ns())
        self._observe(event)
        for listener in tuple(self.listeners):
            listener(event)
        if isinstance(event, (protocol.SessionCreated, protocol.SessionUpdated)):
            self.settings = event.settings
        if self.camera is not None or self._is_for_strangers(event):
            return
        if self.viewer is None and isinstance(event, protocol.SessionStats):
            return
        for dressed in self.shape.dress(event):
            self.log.append(dressed)
        if self.viewer is not None:
            self.viewer.wake()

    def next_stranger_id(self) -> str:
        """For the `event_id` of a message that does not come from the viewer: that it is refused,
        and lists for it, are told to the listeners alone."""
        self._num_strangers += 1
        return f"{self._stranger_ids}{self._num_strangers}"

    def _is_for_strangers(self, event: protocol.ServerEvent) -> bool:
        if isinstance(event, protocol.Error):
            event_id = event.error.event_id
        else:
            event_id = event.event_id if isinstance(event, AlertListed) else None
        return event_id is not None and event_id.startswith(self._stranger_ids)

    def _observe(self, event: protocol.ServerEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(self.session_id, event)
        except Exception:  # the viewer gets the event all the same, and those after it
            log.exception("an observer of the events failed")

    def end(self, code: int, reason: str) -> None:
        """No more events: the connection is closed when it has sent those there are."""
        if self.ending is None:
            self.ending = CloseReason(code, reason)
            self.has_ended.set()
            self.progress.set()
            self.view.wake()
            for listener in tuple(self.listeners):
                listener(None)
            if self.viewer is not None:
                self.viewer.wake()

    def put(self, frame: EncodedFrame, refused: FrameDecodeError | None = None) -> None:
        """The next frame, or one that could not be read from its message."""
        handle = self.handle
        if handle is None:
            return
        self.newest_frame_sequence = max(frame.seq, self.newest_frame_sequence or 0)
        self.newest_time = (frame.capture_us, frame.received_ns)
        if refused is None:
            self.view.offered(frame)
            handle.put_frame(frame)
        else:
            handle.refuse_frame(frame, refused)

    def feed(self, data: bytes, capture_us: int) -> None:
        """The next picture of the server's own camera, a JPEG."""
        self.put(
            EncodedFrame(
                seq=(self.newest_frame_sequence or 0) + 1,
                capture_us=capture_us,
                received_ns=self._clock_ns(),
                data=data,
            )
        )

    async def request(self, message: protocol.ClientMessage, kind: type[Reply]) -> Reply:
        """What the session answers; its viewer sees what is made, too. Raises the error instead,
        and SessionGone."""
        if self.handle is None or self.ending is not None:
            raise SessionGone("the live session has ended", remedy="ask another one")
        self.heard_ns = self._clock_ns()
        message.event_id = self.next_stranger_id()
        return await request(self.handle, self.listeners, message, kind)

    def silent_s(self) -> float:
        """How long its viewer has neither shown nor asked anything; 0 while something it asked for
        waits or is answered, and for one that is still being opened or ended."""
        handle = self.handle
        if self.viewer is None or handle is None or self.ending is not None:
            return 0.0
        if handle.num_waiting or handle.frames_waiting or handle.is_answering:
            return 0.0
        return (self._clock_ns() - self.heard_ns) * 1e-9

    @property
    def is_away(self) -> bool:
        """It has begun, and nobody is connected."""
        return self.viewer is None and self.log.newest > 0
