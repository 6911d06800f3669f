"""The websocket client, for our commands and for scripts.

async with await Client.connect(url, {"delivery": "wait"}) as client:
    for seconds, rgb in pictures:
        await client.send_frame(encode_jpeg(rgb), int(seconds * 1e6))
    await client.wait_processed()
    print((await client.ask("what is there?")).text)
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from edge_vlm.errors import EdgeVlmError, ProtocolError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.connection import (
    CLOSE_TIMEOUT_S,
    Access,
    ResumableConnection,
    ResumePoint,
    error_from_detail,
    frame_key,
)
from edge_vlm_runtime.protocol import alerts as messages

if TYPE_CHECKING:
    import numpy as np

OnEvent = Callable[[protocol.ServerEvent], None]
REPLIES = (
    *(protocol.SessionUpdated, protocol.ConversationItemCreated, messages.AlertCreated),
    *(messages.AlertListed, messages.AlertDeleted),
)
"""Events that answer a message and repeat its `event_id`."""
Detail = Literal["video", "snapshot", "both"]
Reply = TypeVar("Reply", bound=protocol.ServerEvent)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer. Times in seconds; frames by the number `send_frame` returned."""

    text: str
    status: str
    """completed, cancelled or failed."""
    finish_reason: str | None
    ttft_s: float | None
    """Measured by the server: question received to first text."""
    tokens_per_s: float | None
    newest_frame: int
    newest_frame_s: float
    newest_frame_age_s: float
    vision_tokens: int
    output_tokens: int
    kv_tokens: int
    time_offset_s: float
    snapshot: protocol.Snapshot | None = None
    """The picture that was looked at in full detail, if the question asked for one."""
    points: tuple[protocol.PointedAt, ...] = ()
    """Points and tracks in the text."""


class AnswerStream:
    """One answer while it comes: iterate for its deltas, then read `answer`."""

    def __init__(self, question: str) -> None:
        self.question = question
        self.response_id: str | None = None
        self._deltas: asyncio.Queue[str | None] = asyncio.Queue()
        self._done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # An answer nobody waits for must not warn about its exception.
        self._done.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def __aiter__(self) -> AsyncIterator[str]:
        while (delta := await self._deltas.get()) is not None:
            yield delta

    async def answer(self) -> Answer:
        """The whole answer. Raises the typed error that the server sent instead."""
        return await asyncio.shield(self._done)

    def push(self, delta: str) -> None:
        self._deltas.put_nowait(delta)

    def finish(self, result: Answer | EdgeVlmError) -> None:
        self._deltas.put_nowait(None)
        if self._done.done():
            return
        if isinstance(result, Answer):
            self._done.set_result(result)
        else:
            self._done.set_exception(result)


class Client:
    """One session. Not for several tasks at once, except that questions may be asked while another
    task sends frames.

    A connection that breaks comes back by itself within the server's `resume_grace_s`; meanwhile
    everything waits, and nothing is lost."""

    def __init__(self, line: ResumableConnection, on_event: OnEvent | None) -> None:
        self._line = line
        self.on_event = on_event
        self._changed = asyncio.Condition()
        self._failure: EdgeVlmError | None = None
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
        self.accepted: dict[int, protocol.FrameAccepted] = {}
        """Outcome of each frame that was processed, by its number."""
        self.dropped: dict[int, protocol.FrameDropped] = {}
        """Outcome of each frame that was not."""
        self.stats: protocol.SessionStats | None = None
        self.errors: list[protocol.ErrorDetail] = []
        """Every `error` event, in order."""
        self._reader: asyncio.Task[None] | None = None

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
        """Opens a session. `on_event` is called with every event of the server, in order.

        Raises ServerUnreachable, ServerBusy, ProtocolError, and ConfigError for settings that the
        server refuses.
        """
        line = await ResumableConnection.open(url, access or Access(), reconnect=reconnect)
        client = cls(line, on_event)
        client._begin()
        try:
            if settings:
                await client.update(settings)
        except BaseException:
            await client.close()
            raise
        return client

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

        Every event behind `point` comes, none twice; answers to questions of the other client come
        as events only. Raises SessionGone, ReplayLost, and as `connect`.
        """
        line = await ResumableConnection.resume(url, access or Access(), point, reconnect=reconnect)
        client = cls(line, on_event)
        client._begin()
        return client

    def _begin(self) -> None:
        self._tell(self.created)
        self._reader = asyncio.create_task(self._read())

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
        await self._send_json(message, event_id, **fields)
        reply = await future
        if not isinstance(reply, kind):
            raise ProtocolError(f"{message} was answered by {protocol.tag_of(type(reply))}")
        return reply

    async def send_frame(self, picture: bytes | np.ndarray, pts_us: int) -> int:
        """Sends one picture and returns its number: a JPEG, or rgb u8 [H, W, 3] as it is, if the
        session has `raw_frames`.

        Waits while as many frames as the server allows are unacknowledged. Raises what ended the
        connection.
        """
        allowed = self.created.limits.max_unacknowledged_frames
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._failure is not None or len(self._unacknowledged) < allowed
            )
        self._raise_failure()
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
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._failure is not None or not self._unacknowledged
            )
        self._raise_failure()

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
        stream = AnswerStream(text)
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
        """Ends the session. Twice does no harm."""
        with suppress(EdgeVlmError, asyncio.TimeoutError):
            if self._reader is not None and self._failure is None:
                await self._send_json("session.close", self._event_id())
                await asyncio.wait_for(asyncio.shield(self._reader), CLOSE_TIMEOUT_S)
        await self._line.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def drop_counts(self) -> Counter[str]:
        """Dropped frames by reason."""
        return Counter(event.reason for event in self.dropped.values())

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
        except EdgeVlmError as error:
            await self._fail(error)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ---- receiving ---------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while True:
                event = await self._line.receive()
                await self._take(event)
                self._tell(event)
        except EdgeVlmError as error:
            await self._fail(error)

    def _tell(self, event: protocol.ServerEvent) -> None:
        if self.on_event is not None:
            self.on_event(event)

    async def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            if isinstance(event, protocol.FrameAccepted):
                self.accepted[event.frame_sequence] = event
            else:
                self.dropped[event.frame_sequence] = event
            async with self._changed:
                self._unacknowledged.discard(event.frame_sequence)
                self._changed.notify_all()
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
                stream.finish(answer_of(event))
        elif isinstance(event, REPLIES):
            future = self._replies.pop(event.event_id or "", None)
            if future is not None and not future.done():
                future.set_result(event)
        elif isinstance(event, protocol.SessionStats):
            self.stats = event
        elif isinstance(event, protocol.Error):
            self._take_error(event.error)

    def _take_error(self, detail: protocol.ErrorDetail) -> None:
        self.errors.append(detail)
        error = error_from_detail(detail)
        stream = self._by_event_id.pop(detail.event_id or "", None)
        if stream is not None:
            stream.finish(error)
        future = self._replies.pop(detail.event_id or "", None)
        if future is not None and not future.done():
            future.set_exception(error)

    async def _fail(self, error: EdgeVlmError) -> None:
        """The connection is gone: everybody who waits is told why."""
        async with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        for stream in [*self._by_event_id.values(), *self._by_response_id.values()]:
            stream.finish(error)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)


def answer_of(event: protocol.ResponseDone) -> Answer:
    return Answer(
        text=event.text,
        status=event.status,
        finish_reason=event.finish_reason,
        ttft_s=event.ttft_s,
        tokens_per_s=event.tokens_per_s,
        newest_frame=event.newest_frame.frame_sequence,
        newest_frame_s=event.newest_frame.time_s,
        newest_frame_age_s=event.newest_frame.age_s,
        vision_tokens=event.usage.vision_tokens,
        output_tokens=event.usage.output_tokens,
        kv_tokens=event.kv_tokens,
        time_offset_s=event.time_offset_s,
        snapshot=event.snapshot,
        points=event.points,
    )
