"""The websocket client, for our commands and for scripts.

async with await Client.connect(url, {"delivery": "wait"}) as client:
    for seconds, rgb in pictures:
        await client.send_frame(encode_jpeg(rgb), int(seconds * 1e6))
    await client.wait_processed()
    print((await client.ask("what is there?")).text)
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from edge_vlm.errors import EdgeVlmError, ProtocolError, ServerUnreachable
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.answers import Answer as Answer
from edge_vlm_runtime.client.answers import AnswerStream, FrameCounts
from edge_vlm_runtime.client.connection import (
    CLOSE_TIMEOUT_S,
    Access,
    ResumableConnection,
    ResumePoint,
    error_from_detail,
    frame_key,
    name_of,
)
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.base import UnknownEvent

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

OnEvent = Callable[[protocol.ServerEvent], None]
REPLIES = (
    *(protocol.SessionUpdated, protocol.ConversationItemCreated, messages.AlertCreated),
    *(messages.AlertListed, messages.AlertDeleted),
)
"""Events that answer a message and repeat its `event_id`."""
Detail = Literal["video", "snapshot", "both"]
Reply = TypeVar("Reply", bound=protocol.ServerEvent)
Result = TypeVar("Result")


class Client:
    """One session. Not for several tasks at once, except that questions may be asked while another
    task sends frames.

    A connection that breaks comes back by itself within the server's `resume_grace_s`; meanwhile
    everything waits, and nothing is lost. When the connection ends for good, or `on_event` raises,
    whatever waits raises that, and every later call. Nothing is kept but counters and what is still
    waited for.
    """

    def __init__(self, line: ResumableConnection, on_event: OnEvent | None) -> None:
        self._line = line
        self.on_event = on_event
        self._changed = asyncio.Event()
        """Set for a moment when a frame has its outcome, and at the end."""
        self._failure: Exception | None = None
        self._is_raised = False
        """Somebody has been given the failure."""
        self._unacknowledged: set[int] = set()
        self._last_sequence = 0
        self._next_event_id = 0
        self._id_prefix = secrets.token_hex(3)  # a session may have had another client before
        self._by_event_id: dict[str, AnswerStream] = {}
        self._by_response_id: dict[str, AnswerStream] = {}
        self._replies: dict[str, asyncio.Future[protocol.ServerEvent]] = {}
        self.created = line.opening
        if isinstance(line.opening, protocol.SessionResumed):
            self._last_sequence = line.opening.newest_frame_sequence or 0
        self.frames = FrameCounts()
        self.unknown_events: Counter[str] = Counter()
        """Events that only a newer version knows, by type."""
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        url: str,
        settings: Mapping[str, Any] | None = None,
        *,
        on_event: OnEvent | None = None,
        access: Access | None = None,
        reconnect: bool = True,
    ) -> Client:
        """Opens a session. `on_event` is called with every event of the server, in order; of a type
        that is not known yet, with an `UnknownEvent`.

        Raises ServerUnreachable, ServerBusy, ProtocolError, and ConfigError for settings that the
        server refuses.
        """
        line = await ResumableConnection.open(url, access or Access(), reconnect=reconnect)
        return await cls(line, on_event)._begin(settings)

    @classmethod
    async def resume(
        cls,
        url: str,
        point: ResumePoint,
        *,
        on_event: OnEvent | None = None,
        access: Access | None = None,
        reconnect: bool = True,
    ) -> Client:
        """Goes on with a session that another client, perhaps of a process that died, has left.

        Every event after `point` comes, none twice; answers to questions of the other client come
        as events only. Raises SessionGone, ReplayLost, and as `connect`.
        """
        line = await ResumableConnection.resume(url, access or Access(), point, reconnect=reconnect)
        return await cls(line, on_event)._begin(None)

    async def _begin(self, settings: Mapping[str, Any] | None) -> Client:
        try:
            self._report(self.created)
            if settings:
                await self.update(settings)
        except BaseException:
            await self._shut()
            raise
        return self

    @property
    def resume_point(self) -> ResumePoint:
        """Where another process could go on with this session."""
        return self._line.point

    @property
    def reconnects(self) -> int:
        """How often the connection broke and came back."""
        return self._line.reconnects

    # ---- what a script does ------------------------------------------------------------------

    async def update(self, settings: Mapping[str, Any]) -> protocol.SessionUpdated:
        """Changes settings, see `SessionSettings`. Raises ConfigError."""
        return await self._request(
            protocol.SessionUpdated, "session.update", session=dict(settings)
        )

    async def create_alert(self, question: str, **rule: Any) -> messages.AlertStatus:
        """Watches for something from now on; `rule`: the other fields of `alert.create`.

        What happens comes through `on_event`. Raises ConfigError, QuestionTooLong, TooManyAlerts,
        AlertsUnsupported.
        """
        kind = messages.AlertCreated
        return (await self._request(kind, "alert.create", question=question, **rule)).alert

    async def alerts(self) -> list[messages.AlertStatus]:
        """All alerts, when every frame that the model remembers has been checked."""
        return (await self._request(messages.AlertListed, "alert.list")).alerts

    async def delete_alert(self, alert_id: str) -> None:
        """Raises UnknownAlert."""
        await self._request(messages.AlertDeleted, "alert.delete", alert_id=alert_id)

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

    async def send_frame(self, picture: bytes | np.ndarray, pts_us: int) -> int:
        """Sends one picture and returns its number: a JPEG, or rgb u8 [H, W, 3] as it is, if the
        session has `raw_frames`.

        Waits while as many frames as the server allows are unacknowledged.
        """
        allowed = self.created.limits.max_unacknowledged_frames
        await self._until(lambda: len(self._unacknowledged) < allowed)
        self._last_sequence += 1
        sequence = self._last_sequence
        self._unacknowledged.add(sequence)
        if isinstance(picture, bytes):
            message = protocol.frame_message(sequence, pts_us, picture)
        else:
            message = protocol.raw_frame_message(sequence, pts_us, picture)
        await self._send(message.encode(), frame_key(sequence))
        return sequence

    async def wait_processed(self) -> None:
        """Returns when every frame sent so far has its outcome."""
        await self._until(lambda: not self._unacknowledged)

    async def say(self, text: str) -> None:
        """Adds to the next question, which may then have no text of its own. Raises
        QuestionTooLong."""
        item = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": text}],
        }
        kind = protocol.ConversationItemCreated
        await self._request(kind, "conversation.item.create", item=item)

    async def start_answer(self, text: str, detail: Detail = "video") -> AnswerStream:
        """Asks a question; the answer streams in while frames can be sent. `detail`: what is
        looked at, see `response.create`."""
        event_id = self._event_id()
        stream = AnswerStream(text, self.wait)
        self._by_event_id[event_id] = stream
        asked = None if detail == "video" else detail  # an older server knows nothing else
        await self._send_json("response.create", event_id, text=text, detail=asked)
        return stream

    async def ask(self, text: str, detail: Detail = "video") -> Answer:
        """Asks a question and waits. Raises NoFrameYet, SnapshotsUnsupported and the other typed
        errors of a session."""
        return await (await self.start_answer(text, detail)).answer()

    async def cancel(self, response_id: str | None = None) -> None:
        """Stops one answer, or all that are under way or waiting."""
        await self._send_json("response.cancel", self._event_id(), response_id=response_id)

    async def close(self) -> None:
        """Ends the session and closes the connection, whatever happens. Twice does no harm.

        Raises what `on_event` raised if no other call has."""
        await self._shut()
        if not self._is_raised and not isinstance(self._failure, EdgeVlmError):
            self._raise_failure()

    async def _shut(self) -> None:
        try:
            if self._failure is None:
                with suppress(EdgeVlmError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._say_goodbye(), CLOSE_TIMEOUT_S)
        finally:
            self._reader.cancel()
            await self._line.close()
            await asyncio.wait([self._reader])

    async def _say_goodbye(self) -> None:
        await self._send_json("session.close", self._event_id())
        await asyncio.wait([self._reader])

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await (self.close() if error is None else self._shut())

    # ---- waiting -----------------------------------------------------------------------------

    async def wait(self, future: asyncio.Future[Result]) -> Result:
        """What comes of the future. Raises what ends the client meanwhile."""
        await asyncio.wait([future, self._reader], return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            self._raise_failure()
        return future.result()

    async def _until(self, is_met: Callable[[], bool]) -> None:
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

    # ---- sending -----------------------------------------------------------------------------

    def _event_id(self) -> str:
        self._next_event_id += 1
        return f"event_{self._id_prefix}_{self._next_event_id}"

    async def _send_json(self, kind: str, event_id: str, **fields: Any) -> None:
        text = protocol.json_object({"type": kind, "event_id": event_id, **fields})
        await self._send(text, event_id)

    async def _send(self, data: str | bytes, key: str) -> None:
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

    def _report(self, event: protocol.ServerEvent) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            self.frames.add(event)
            self._unacknowledged.discard(event.frame_sequence)
            self._wake()
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
            future = self._replies.pop(event.event_id or "", None)
            if future is not None and not future.done():
                future.set_result(event)
        elif isinstance(event, UnknownEvent):
            if event.name not in self.unknown_events:
                log.warning("the server sends %s events, which are not known here", event.name)
            self.unknown_events[event.name] += 1
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
            log.warning("the server reports %s: %s", detail.code, detail.message)
