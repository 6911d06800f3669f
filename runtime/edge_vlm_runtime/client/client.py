"""The websocket client, for our commands and for scripts.

async with connect("localhost:8765", {"delivery": "wait"}) as client:
    for seconds, rgb in pictures:
        await client.send_frame(rgb, int(seconds * 1e6))
    await client.wait_processed()
    print((await client.ask("what is there?")).shown_text)

docs/python.md shows the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from edge_vlm.errors import ConfigError, EdgeVlmError, MessageTooLarge
from edge_vlm.pixels.frames import encode_jpeg, require_rgb
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.address import stream_url
from edge_vlm_runtime.client.answers import Answer as Answer
from edge_vlm_runtime.client.answers import AnswerStream as AnswerStream
from edge_vlm_runtime.client.bounds import MOST_UNACKNOWLEDGED
from edge_vlm_runtime.client.connection import Access, ResumableConnection, ResumePoint, frame_key
from edge_vlm_runtime.client.events import EventStream as EventStream
from edge_vlm_runtime.client.events import Kind
from edge_vlm_runtime.client.exchange import Exchange
from edge_vlm_runtime.client.exchange import OnEvent as OnEvent
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.typed import (
    RuleFields,
    Settings,
    checked,
    require_known,
    require_plain_function,
)

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

Detail = Literal["video", "snapshot", "both", "text"]


class Client(Exchange):
    """One session. Not for several tasks at once, except that questions may be asked while another
    task sends frames.

    A connection that breaks comes back by itself within the server's `resume_grace_s`; meanwhile
    everything waits, and nothing is lost. When the connection ends for good, or `on_event` raises,
    whatever waits raises that, and every later call. Nothing is kept but counters and what is still
    waited for.
    """

    @classmethod
    async def connect(
        cls,
        url: str,
        settings: Settings | None = None,
        *,
        on_event: OnEvent | None = None,
        access: Access | None = None,
        reconnect: bool = True,
    ) -> Client:
        """Opens a session, as `connect` does. `url`: see `address`. `on_event` is called with every
        event of the server, in order; of a type that is not known yet, with an `UnknownEvent`.

        Raises ServerUnreachable, ServerBusy, ProtocolError, and ConfigError for settings that the
        server refuses.
        """
        require_plain_function(on_event)
        line = await ResumableConnection.open(url, access or Access(), reconnect=reconnect)
        return await cls(line, on_event)._begin(settings)

    @classmethod
    async def subscribe(
        cls,
        url: str,
        stream: str,
        *,
        on_event: OnEvent | None = None,
        access: Access | None = None,
    ) -> Client:
        """Looks at a stream that the server owns: its events come, questions and alerts go; frames
        and settings are the server's own.

        Raises ServerUnreachable, ServerBusy, ProtocolError, UnknownStream. A connection that breaks
        does not come back: subscribe again.
        """
        line = await ResumableConnection.open(
            stream_url(url, stream), access or Access(), reconnect=False
        )
        return await cls(line, on_event)._begin(None)

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
        require_plain_function(on_event)
        line = await ResumableConnection.resume(url, access or Access(), point, reconnect=reconnect)
        return await cls(line, on_event)._begin(None)

    async def _begin(self, settings: Settings | None) -> Client:
        try:
            self._report(self.created)
            if settings:
                await self.update(settings)
        except BaseException:
            await self._shut()
            raise
        return self

    # ---- what a script does ------------------------------------------------------------------

    async def update(self, settings: Settings) -> protocol.SessionUpdated:
        """Changes settings, see `SessionSettings`. Raises ConfigError."""
        require_known(settings, Settings, "session settings")
        checked(protocol.SessionUpdate, "session settings", session=dict(settings))
        return await self._request(
            protocol.SessionUpdated, "session.update", session=dict(settings)
        )

    async def create_alert(self, question: str, **rule: Unpack[RuleFields]) -> messages.AlertStatus:
        """Watches for something from now on; `rule`: the other fields of `alert.create`.

        What happens comes through `alerts` and `on_event`. Raises ConfigError, QuestionTooLong,
        TooManyAlerts, AlertsUnsupported.
        """
        require_known(rule, RuleFields, "alert rule")
        checked(messages.AlertCreate, "alert rule", question=question, **rule)
        kind = messages.AlertCreated
        return (await self._request(kind, "alert.create", question=question, **rule)).alert

    async def list_alerts(self) -> list[messages.AlertStatus]:
        """All alerts, when every frame that the model remembers has been checked."""
        return (await self._request(messages.AlertListed, "alert.list")).alerts

    async def delete_alert(self, alert_id: str) -> None:
        """Raises UnknownAlert."""
        await self._request(messages.AlertDeleted, "alert.delete", alert_id=alert_id)

    @overload
    def events(self) -> EventStream[protocol.ServerEvent]: ...

    @overload
    def events(self, *kinds: type[Kind]) -> EventStream[Kind]: ...

    def events(self, *kinds: type[Any]) -> EventStream[Any]:
        """All that the server says from now on, or what of it is of these kinds: `async for`.

        Raises ConfigError for what is no class of an event."""
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, protocol.ServerEvent)):
                raise ConfigError(
                    f"not a kind of event: {kind!r}",
                    remedy="give classes of edge_vlm_runtime.protocol, such as FrameAccepted",
                )
        return self._listen(*(kinds or (protocol.ServerEvent,)))

    def alerts(self) -> EventStream[messages.AlertTriggered | messages.AlertCleared]:
        """Begins and ends of alerts from now on: `async for`."""
        return self._listen(messages.AlertTriggered, messages.AlertCleared)

    async def send_frame(self, picture: bytes | np.ndarray, pts_us: int | None = None) -> int:
        """Sends one picture and returns its number: a JPEG, or rgb u8 [H, W, 3], which goes as it
        is if the session has `raw_frames` and as a JPEG if not.

        `pts_us`: when it was taken, in microseconds from any starting point; without it, now. One
        session has one kind of times: the time of day does not follow those of a file.

        Waits while as many frames as the server allows are unacknowledged. Raises ValueError for
        what is no picture or time, MessageTooLarge for more than the server takes. Bytes go as they
        are: those that are no JPEG are dropped there, as `decode_error`.
        """
        if not isinstance(picture, bytes):
            require_rgb(picture)
        if pts_us is None:
            pts_us = self._epoch_us + time.monotonic_ns() // 1000
        pts_us = protocol.capture_time(pts_us)
        limits = self.created.limits
        most = min(limits.max_unacknowledged_frames, MOST_UNACKNOWLEDGED)
        await self._until(lambda: len(self._unacknowledged) < most)
        sequence = self._last_sequence + 1
        if isinstance(picture, bytes):
            message = protocol.frame_message(sequence, pts_us, picture)
        elif self.settings.raw_frames:
            message = protocol.raw_frame_message(sequence, pts_us, picture)
        else:
            message = protocol.frame_message(sequence, pts_us, encode_jpeg(picture))
        data = message.encode()
        if len(data) > limits.max_message_bytes:  # the server would end the session
            raise MessageTooLarge(
                f"a frame of {len(data)} bytes, the server takes {limits.max_message_bytes}",
                remedy="make it smaller, or start the server with a larger --max-message-bytes",
            )
        if pts_us <= self._newest_us and not self._is_told_of_times:
            self._is_told_of_times = True
            log.warning(
                "frame %d is of %d us, not after the %d us before it: it will be dropped as stale. "
                "One session has one kind of times",
                *(sequence, pts_us, self._newest_us),
            )
        self._newest_us = max(self._newest_us, pts_us)
        self._last_sequence = sequence  # from here on there will be an outcome
        self._unacknowledged.add(sequence)
        await self._send(data, frame_key(sequence))
        return sequence

    async def check(self) -> None:
        """Raises what has ended the client, if anything."""
        self._raise_failure()

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
        try:
            await self._send_json("response.create", event_id, text=text, detail=asked)
        except BaseException:
            self._by_event_id.pop(event_id, None)
            raise
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
        is_end = isinstance(self._failure, EdgeVlmError) and self._failure is not self._bug
        if not self._is_raised and not is_end:
            self._raise_failure()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await (self.close() if error is None else self._shut())


class Connecting:
    """What `connect` returns: await it for a client, or enter it for one that is closed."""

    def __init__(self, opening: Coroutine[Any, Any, Client]) -> None:
        self._opening = opening
        self._client: Client | None = None

    def __await__(self) -> Generator[Any, None, Client]:
        return self._opening.__await__()

    async def __aenter__(self) -> Client:
        self._client = await self._opening
        return self._client

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._client is not None
        await self._client.__aexit__(kind, error, trace)


def connect(
    url: str,
    settings: Settings | None = None,
    *,
    on_event: OnEvent | None = None,
    access: Access | None = None,
    reconnect: bool = True,
) -> Connecting:
    """`async with connect("localhost:8765") as client`, or `client = await connect(...)`. As
    `Client.connect`."""
    return Connecting(
        Client.connect(url, settings, on_event=on_event, access=access, reconnect=reconnect)
    )
