"""What is under way between a client and its server: messages out, events in, who waits for what.

Nothing is kept but counters and what is still waited for. Whatever ends the reading of events, the
connection, a bug or `on_event`, is raised by all that waits and by every later call.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from edge_vlm.errors import EdgeVlmError, MessageTooLarge, ProtocolError, ServerUnreachable
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.answers import AnswerStream, FrameCounts
from edge_vlm_runtime.client.bounds import Told, count
from edge_vlm_runtime.client.connection import (
    CLOSE_TIMEOUT_S,
    ResumableConnection,
    ResumePoint,
    error_from_detail,
    name_of,
)
from edge_vlm_runtime.client.events import EventStream, Kind
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.base import UnknownEvent

log = logging.getLogger(__name__)

OnEvent = Callable[[protocol.ServerEvent], None]
REPLIES = (
    *(protocol.SessionUpdated, protocol.ConversationItemCreated, messages.AlertCreated),
    *(messages.AlertListed, messages.AlertDeleted),
)
"""Events that answer a message and repeat its `event_id`."""
Reply = TypeVar("Reply", bound=protocol.ServerEvent)
Result = TypeVar("Result")


class Exchange:
    """That of one session. Begins to read when it is made."""

    def __init__(self, line: ResumableConnection, on_event: OnEvent | None) -> None:
        self._line = line
        self.on_event = on_event
        self._changed = asyncio.Event()
        """Set for a moment when a frame has its outcome, and at the end."""
        self._failure: Exception | None = None
        self._is_raised = False
        """Somebody has been given the failure."""
        self._bug: Exception | None = None
        """What `on_event` raised."""
        self._told = Told()
        self._said: str | None = None
        """Of the last frame that was dropped for an error: a thousand alike are said once."""
        self._unacknowledged: set[int] = set()
        self._last_sequence = 0
        self._newest_us = -1
        """Capture time of the newest frame sent."""
        self._is_told_of_times = False
        self._next_event_id = 0
        self._id_prefix = secrets.token_hex(3)  # a session may have had another client before
        self._by_event_id: dict[str, AnswerStream] = {}
        self._by_response_id: dict[str, AnswerStream] = {}
        self._replies: dict[str, asyncio.Future[protocol.ServerEvent]] = {}
        self.created = line.opening
        self.settings = line.opening.settings
        """In force now."""
        self.video = line.opening.video
        """How much video a question can be shown now; None if the server does not say."""
        self.notes: list[str] = []
        """What the server says of these settings with its model."""
        if isinstance(line.opening, protocol.SessionCreated):
            self.notes = line.opening.notes or []
        if isinstance(line.opening, protocol.SessionResumed):
            self._last_sequence = line.opening.newest_frame_sequence or 0
        self.frames = FrameCounts()
        self.unknown_events: Counter[str] = Counter()
        """Events that only a newer version knows, by type."""
        self._streams: weakref.WeakSet[EventStream[Any]] = weakref.WeakSet()
        self._is_closing = False
        self._epoch_us = (time.time_ns() - time.monotonic_ns()) // 1000
        """Makes a time of day of the monotonic clock, for frames that come "now": it goes on in
        another process, and does not jump when the machine's clock is set."""
        self._reader = asyncio.create_task(self._read())

    @property
    def resume_point(self) -> ResumePoint:
        """Where another process could go on with this session."""
        return self._line.point

    @property
    def reconnects(self) -> int:
        """How often the connection broke and came back."""
        return self._line.reconnects

    # ---- waiting -----------------------------------------------------------------------------

    async def wait(self, future: asyncio.Future[Result]) -> Result:
        """What comes of the future. Raises what ends the client meanwhile."""
        either: set[asyncio.Future[Any]] = {future, self._reader}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            self._raise_failure()
        return future.result()

    def _require_own_loop(self) -> None:
        """Raises RuntimeError: whoever waits in another loop may never be woken."""
        if asyncio.get_running_loop() is not self._reader.get_loop():
            raise RuntimeError(
                "a Client belongs to the event loop that it was made in; "
                "SyncClient is for several threads"
            )

    async def _until(self, is_met: Callable[[], bool]) -> None:
        self._require_own_loop()
        while self._failure is None and not is_met():
            await self._changed.wait()
        self._raise_failure()

    def fail(self, error: Exception) -> None:
        """Ends reading: whatever waits raises `error`, and every later call."""
        self._failure = self._failure or error
        self._reader.cancel()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._is_raised = True
            raise self._failure

    async def _shut(self) -> None:
        self._is_closing = True
        try:
            if self._failure is None:
                with suppress(EdgeVlmError, asyncio.TimeoutError):
                    await within(CLOSE_TIMEOUT_S, self._say_goodbye())
        finally:
            self._reader.cancel()
            await self._line.close()
            await asyncio.wait([self._reader])

    async def _say_goodbye(self) -> None:
        await self._send_json("session.close", self._event_id())
        await asyncio.wait([self._reader])

    # ---- sending -----------------------------------------------------------------------------

    def _event_id(self) -> str:
        self._next_event_id += 1
        return f"event_{self._id_prefix}_{self._next_event_id}"

    async def _send_json(self, kind: str, event_id: str, **fields: Any) -> None:
        text = protocol.json_object({"type": kind, "event_id": event_id, **fields})
        most = self.created.limits.max_message_bytes
        if len(text.encode()) > most:  # the server would end the session
            raise MessageTooLarge(
                f"a message of {len(text.encode())} bytes, the server takes {most}"
            )
        await self._send(text, event_id)

    async def _request(self, kind: type[Reply], message: str, **fields: Any) -> Reply:
        """Sends a message and waits for the event that answers it. Raises the error instead."""
        event_id = self._event_id()
        future: asyncio.Future[protocol.ServerEvent] = asyncio.get_running_loop().create_future()
        self._replies[event_id] = future
        try:
            await self._send_json(message, event_id, **fields)
            reply = await self.wait(future)
        finally:
            self._replies.pop(event_id, None)
        if not isinstance(reply, kind):
            raise ProtocolError(f"{message} was answered by {name_of(reply)}")
        return reply

    async def _send(self, data: str | bytes, key: str) -> None:
        self._require_own_loop()
        self._raise_failure()
        try:
            await self._line.send(data, key)
        except EdgeVlmError as error:  # the reader meets it too, after what came before
            self._failure = self._failure or error
            self._raise_failure()

    # ---- receiving ---------------------------------------------------------------------------

    async def _read(self) -> None:
        """Whatever ends it is given to whoever waits."""
        try:
            await self._take_events()
        except Exception as error:  # noqa: BLE001 - handed over
            self._failure = self._failure or error
        finally:
            self._failure = self._failure or ServerUnreachable("the client was closed")
            for stream in [*self._by_event_id.values(), *self._by_response_id.values()]:
                stream.push(None)
            for events in tuple(self._streams):
                events.end(None if self._is_closing else self._failure)
            self._wake()

    async def _take_events(self) -> None:
        """A coroutine of its own, so that even a StopIteration of `on_event` comes out of it as an
        exception that a task can hand over."""
        while True:
            event = await self._line.receive()
            self._take(event)
            self._report(event)

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()

    def _listen(self, *kinds: type[Kind]) -> EventStream[Kind]:
        stream = EventStream(kinds)
        if self._reader.done():
            stream.end(None if self._is_closing else self._failure)
        self._streams.add(stream)
        return stream

    def _report(self, event: protocol.ServerEvent) -> None:
        for stream in tuple(self._streams):
            stream.push(event)
        if self.on_event is None:
            return
        try:
            self.on_event(event)
        except asyncio.CancelledError as error:  # nobody has cancelled the task that calls it
            self._bug = RuntimeError("on_event raised CancelledError")
            raise self._bug from error
        except Exception as error:
            self._bug = error
            raise

    def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            self.frames.add(event)
            if isinstance(event, protocol.FrameDropped) and event.message not in (None, self._said):
                self._said = event.message
                self._tell(f"frame {event.frame_sequence} was dropped: {event.message}")
            self._unacknowledged.discard(event.frame_sequence)
            self._wake()
        elif isinstance(event, protocol.ClipChosen):
            self.frames.add(event)
        elif isinstance(event, protocol.ResponseCreated):
            stream = self._by_event_id.pop(event.event_id or "", None)
            if stream is not None:
                stream.response_id = event.response_id
                self._by_response_id[event.response_id] = stream
        elif isinstance(event, protocol.ResponseOutputTextDelta):
            if event.response_id in self._by_response_id:
                self._by_response_id[event.response_id].push(event.delta)
        elif isinstance(event, protocol.ResponseDone):
            stream = self._by_response_id.pop(event.response_id, None)
            if stream is not None:
                stream.finish(event)
        elif isinstance(event, REPLIES):
            if isinstance(event, protocol.SessionUpdated):
                self.settings, self.video = event.settings, event.video
                self.notes = event.notes or []
            future = self._replies.pop(event.event_id or "", None)
            if future is not None and not future.done():
                future.set_result(event)
        elif isinstance(event, UnknownEvent):
            if event.name not in self.unknown_events:
                self._tell(f"the server sends {event.name} events, which are not known here")
            count(self.unknown_events, event.name)
        elif isinstance(event, protocol.Error):
            self._take_error(event.error)

    def _take_error(self, detail: protocol.ErrorDetail) -> None:
        error = error_from_detail(detail)
        stream = self._by_event_id.pop(detail.event_id or "", None)
        if stream is not None:
            stream.finish(error)
        future = self._replies.pop(detail.event_id or "", None)
        if future is not None and not future.done():
            future.set_exception(error)
        if stream is None and future is None:
            self._tell(f"the server reports {detail.code}: {detail.message}")

    def _tell(self, text: str) -> None:
        if (line := self._told.line(text)) is not None:
            log.warning("%s", line)
