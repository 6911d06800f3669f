"""Somebody who watches a camera of the server over a websocket: its events come, questions go.

Every subscriber has a log of its own, so that one who reads slowly loses only its own connection.
All see every frame's outcome, every alert and every answer; what answers a message of one of them,
and the errors of its messages, goes to that one alone. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any, Protocol

from edge_vlm.errors import (
    EdgeVlmError,
    MessageTooLarge,
    NotForSubscribers,
    ProtocolError,
    QuestionTooLong,
    ServerBusy,
)
from edge_vlm.waiting import cancel, within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.openai.realtime import RealtimeShape
from edge_vlm_runtime.protocol import alerts as alert_messages
from edge_vlm_runtime.protocol.base import MAX_TEXT
from edge_vlm_runtime.protocol.questions import lines
from edge_vlm_runtime.server.client_session import ClientSession, CloseReason
from edge_vlm_runtime.server.event_log import EventLog
from edge_vlm_runtime.session.asking.questions import has_own_dialogue

log = logging.getLogger(__name__)

GOODBYE_TIMEOUT_S = 1.0
MAX_WAITING_CALLS = 32
"""Messages the engines have not come to; further ones are left in the socket."""
OWNERS = (
    *(protocol.SessionUpdate, protocol.InputVideoFrameAppend, protocol.InputImageBufferAppend),
    protocol.SessionResume,
)
REPLIES = (
    *(protocol.SessionUpdated, alert_messages.AlertCreated, alert_messages.AlertListed),
    alert_messages.AlertDeleted,
)
_numbers = itertools.count(1)


class WebSocket(Protocol):
    """What is needed of Starlette's WebSocket."""

    async def receive(self) -> MutableMapping[str, Any]: ...

    async def send_text(self, data: str) -> None: ...

    async def send_bytes(self, data: bytes) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class Subscription:
    """Runs one accepted websocket to its end."""

    def __init__(
        self,
        websocket: WebSocket,
        session: ClientSession,
        created: protocol.SessionCreated,
        *,
        max_message_bytes: int,
        with_pictures: bool,
        is_of_file: Callable[[str], bool],
        is_draining: Callable[[], bool],
        on_lost_picture: Callable[[], None] = lambda: None,
        party: str | None = None,
    ) -> None:
        """`created`: the first event; `is_of_file`: whether the alert of an id may not be deleted
        here; `on_lost_picture`: the other side did not read one in time."""
        self.party = party
        self._websocket = websocket
        self._session = session
        self._max_message_bytes = max_message_bytes
        self._with_pictures = with_pictures
        self._is_of_file = is_of_file
        self._is_draining = is_draining
        self._on_lost_picture = on_lost_picture
        limits = created.limits
        self._log = EventLog(max_events=limits.max_replay_events, max_bytes=limits.max_replay_bytes)
        self._shape = RealtimeShape(session.session_id, created.model.bundle)
        self._prefix = f"subscriber_{next(_numbers)}_"
        self._messages = itertools.count(1)
        self._sent = 0
        """Number of the last event that was sent."""
        self._news = asyncio.Event()
        self._picture: bytes | None = None
        self._ending: CloseReason | None = None
        self._overflowed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unasked_text = ""
        self._event_ids: dict[str, str | None] = {}
        """Of messages that are not answered yet: as they are called in the session, and here."""
        self._waiting: set[str] = set()
        """Questions without an answer yet, as they are called in the session."""
        self._withdrawn: set[str] = set()
        """Those of them whose answer is not wanted any more."""
        self._answers: set[str] = set()
        """Own answers under way, by `response_id`."""
        self._others: set[str] = set()
        """Others' answers under way."""
        self._has_left = False
        self._say(created)

    async def run(self) -> None:
        """Serves the connection; returns when it is closed."""
        self._session.listeners.add(self._tell)
        if self._session.ending is not None:
            self._tell(None)
        sending = asyncio.create_task(self._send_loop())
        receiving = asyncio.create_task(self._receive_loop())
        try:
            await asyncio.wait(
                [sending, receiving, self._overflowed], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._leave()
            await cancel(sending, receiving)
            _, received = await asyncio.gather(sending, receiving, return_exceptions=True)
            if isinstance(received, Exception):
                log.error("a subscriber's connection failed", exc_info=received)
                await self._say_goodbye(1011, "the connection failed")
            elif self._overflowed.done():
                await self._say_goodbye(1013, "the client reads too slowly")

    async def _say_goodbye(self, code: int, reason: str) -> None:
        with suppress(Exception):  # the other side may be gone already
            await within(GOODBYE_TIMEOUT_S, self._websocket.close(code, reason))

    def _leave(self) -> None:
        """Its answers end; it listens on until those that wait have had their turn."""
        self._has_left = True
        self._cancel_all()
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._has_left and not self._waiting:
            self._session.listeners.discard(self._tell)

    # ---- what the session says ---------------------------------------------------------------

    def stream_changed(self, stream: protocol.Stream) -> None:
        """The camera went away, came back or ended."""
        self._say(protocol.StreamUpdated(stream=stream))

    def _tell(self, event: protocol.ServerEvent | None) -> None:
        """The session's next event; None: there will be no more."""
        if event is None:
            self._ending = self._session.ending or CloseReason(1001, "the session has ended")
            self._waiting.clear()
            self._news.set()
            return
        mine = self._take_note(event)
        if self._has_left:
            self._stop_listening()
            return
        shown = self._as_shown(event, mine)
        if shown is None:
            return
        self._say(shown)
        if isinstance(event, protocol.FrameAccepted) and self._with_pictures:
            self._show(event.frame_sequence)

    def _take_note(self, event: protocol.ServerEvent) -> str | None:
        """Follows questions and answers; returns how the event's own message is called, if it
        answers one of this subscriber's."""
        name = getattr(event, "event_id", None)
        if isinstance(event, protocol.Error):
            name = event.error.event_id
        mine = name if name in self._event_ids else None
        if isinstance(event, protocol.ResponseCreated):
            (self._answers if mine else self._others).add(event.response_id)
            if mine in self._withdrawn:
                self._cancel(event.response_id)
        elif isinstance(event, protocol.ResponseDone):
            self._answers.discard(event.response_id)
            self._others.discard(event.response_id)
        if mine is not None:
            self._waiting.discard(mine)
            self._withdrawn.discard(mine)
        return mine

    def _as_shown(
        self, event: protocol.ServerEvent, mine: str | None
    ) -> protocol.ServerEvent | None:
        """None: it is not for this subscriber."""
        if isinstance(event, protocol.Error):
            if event.error.event_id is None:
                return copy.copy(event)
            if mine is None:
                return None
            detail = copy.copy(event.error)
            detail.event_id = self._event_ids.pop(mine)
            return protocol.Error(error=detail)
        shown = copy.copy(event)
        if isinstance(event, alert_messages.AlertListed) and mine is None:
            return None
        if isinstance(event, (protocol.ResponseCreated, *REPLIES)):
            own = None if mine is None else self._event_ids.pop(mine)
            shown.event_id = own  # type: ignore[attr-defined]
        return shown

    def _say(self, event: protocol.ServerEvent) -> None:
        for dressed in self._shape.dress(event):
            self._log.append(dressed)
        self._news.set()
        if not self._log.covers(self._sent) and not self._overflowed.done():
            self._overflowed.set_result(None)

    def _refuse(self, error: EdgeVlmError, event_id: str | None) -> None:
        self._say(protocol.error_event(error, event_id=event_id))

    def _show(self, frame_sequence: int) -> None:
        """The newest picture that the model was shown; one that was not sent yet is lost."""
        newest = self._session.view.newest
        if newest is None or newest.frame.seq != frame_sequence:
            return
        if self._picture is not None:
            self._on_lost_picture()
        frame = newest.frame
        message = protocol.frame_message(frame.seq, frame.capture_us, frame.data)
        self._picture = message.encode()

    async def _send_loop(self) -> None:
        while True:
            while self._sent < self._log.newest:
                await self._websocket.send_text(self._log.text(self._sent + 1))
                self._sent += 1
                self._log.forget(self._sent)
            if self._picture is not None:
                picture, self._picture = self._picture, None
                await self._websocket.send_bytes(picture)
                continue
            if self._ending is not None:
                # RFC 6455 5.5: a control frame holds 125 bytes, two of them are the code.
                reason = self._ending.reason.encode()[:120].decode(errors="ignore")
                await self._websocket.close(self._ending.code, reason)
                return
            self._news.clear()
            await self._news.wait()

    # ---- what the subscriber says ------------------------------------------------------------

    async def _receive_loop(self) -> None:
        session = self._session
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if self._ending is not None or session.handle is None:
                continue
            data: str | bytes = message.get("text") or message.get("bytes") or b""
            try:
                self._take(data)
            except EdgeVlmError as error:
                event_id = protocol.event_id_of(data) if isinstance(data, str) else None
                self._refuse(error, event_id)
                if isinstance(error, ProtocolError) and error.close_code is not None:
                    self._ending = CloseReason(error.close_code, str(error))
                    self._news.set()
            while (
                session.ending is None
                and session.handle is not None
                and session.handle.num_waiting > MAX_WAITING_CALLS
            ):
                session.progress.clear()
                await session.progress.wait()

    def _take(self, data: str | bytes) -> None:
        """Raises ProtocolError and its leaves, NotForSubscribers, ServerBusy, QuestionTooLong."""
        if len(data) > self._max_message_bytes:
            raise MessageTooLarge(
                f"a message of {len(data)} bytes", remedy=f"the limit is {self._max_message_bytes}"
            )
        if isinstance(data, bytes):
            raise NotForSubscribers(
                "a subscriber shows no pictures: the camera is the server's own",
                remedy="connect without ?stream= to have a session of your own",
            )
        message = protocol.decode_client_message(data)
        if isinstance(message, OWNERS):
            raise NotForSubscribers(
                f"a subscriber may not send {protocol.tag_of(type(message))}: the stream is the "
                "server's own",
                remedy="change it in the server's file",
            )
        if isinstance(message, protocol.Ping):
            self._say(protocol.Pong(event_id=message.event_id))
        elif isinstance(message, protocol.SessionClose):
            self._say(protocol.SessionClosed(reason="the client closed it"))
            self._ending = CloseReason(1000, "closed by the client")
            self._news.set()
        elif isinstance(message, protocol.ConversationItemCreate):
            self._keep_text(message)
        elif isinstance(message, protocol.ResponseCancel):
            self._take_cancel(message.response_id)
        else:
            self._pass_on(message)

    def _pass_on(self, message: protocol.ClientMessage) -> None:
        handle = self._session.handle
        assert handle is not None  # checked by the caller
        if isinstance(message, alert_messages.AlertDelete) and self._is_of_file(message.alert_id):
            raise NotForSubscribers(
                "this alert belongs to the server's file", remedy="remove it there"
            )
        own = message.event_id
        name = f"{self._prefix}{next(self._messages)}"
        if isinstance(message, protocol.ResponseCreate):
            if self._is_draining():
                raise ServerBusy("the server is stopping", remedy="connect again later")
            if not has_own_dialogue(message):
                message.text = self._with_unasked(message.text)
            self._waiting.add(name)
        message.event_id = name
        self._event_ids[name] = own
        if isinstance(message, protocol.ResponseCreate):
            self._shape.asked(message)
        handle.take(message)

    def _keep_text(self, message: protocol.ConversationItemCreate) -> None:
        item = message.item
        if any(isinstance(part.image_url, str) for part in item.content):
            raise NotForSubscribers(
                "a subscriber shows no pictures: the camera is the server's own",
                remedy="connect without ?stream= to have a session of your own",
            )
        self._unasked_text = self._with_unasked(item.text)
        self._say(protocol.ConversationItemCreated(item=item, event_id=message.event_id))

    def _with_unasked(self, text: str) -> str:
        """Of this subscriber: what others have said is theirs to ask."""
        whole, self._unasked_text = lines([self._unasked_text, text]), ""
        if len(whole) > MAX_TEXT:
            raise QuestionTooLong(f"{len(whole)} characters", remedy=f"{MAX_TEXT} are allowed")
        return whole

    def _take_cancel(self, response_id: str | None) -> None:
        if response_id is None:
            self._cancel_all()
        elif response_id in self._answers:
            self._cancel(response_id)
        elif response_id in self._others:
            raise NotForSubscribers("somebody else has asked for this answer")

    def _cancel_all(self) -> None:
        """Own answers; one that waits for its turn is ended when it begins."""
        self._withdrawn |= self._waiting
        for response_id in tuple(self._answers):
            self._cancel(response_id)

    def _cancel(self, response_id: str) -> None:
        if self._session.handle is not None:
            self._session.handle.take(protocol.ResponseCancel(response_id=response_id))
