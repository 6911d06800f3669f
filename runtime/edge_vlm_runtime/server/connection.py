"""One websocket: messages in, events out, and the ways it can end.

1000  the client closed the session        1009  a message above the limit
1001  the server is stopping               1011  a bug of ours ended the session
1003  nothing but binary garbage so far    1013  no free session, or the client reads too slowly
1008  not allowed, no such session to go on with, or another connection went on with it

A connection that breaks without a word leaves its session behind, see `sessions`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any, Protocol

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    FrameDecodeError,
    MessageTooLarge,
    ProtocolError,
    ServerBusy,
    SessionError,
    Unauthorized,
)
from edge_vlm.waiting import cancel, within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.openai.media import inline_picture
from edge_vlm_runtime.openai.realtime import without_pictures
from edge_vlm_runtime.server.sessions import ClientSession, SessionRegistry, resolve
from edge_vlm_runtime.session.frames import EncodedFrame, Encoding

log = logging.getLogger(__name__)

GOODBYE_TIMEOUT_S = 1.0
RESUME_TIMEOUT_S = 10.0
"""A connection that wants to go on with a session must say with which one."""
MAX_WAITING_CALLS = 32
"""Messages the engines have not come to; further ones are left in the socket."""
LONG_TEXT = 2000
"""Characters that are not read on the engine thread."""
BROKEN_CODES = {1005, 1006, 1011, 1012}
"""RFC 6455, 7.4.1: no close frame, or one from a side in trouble. The viewer may come back."""


class WebSocket(Protocol):
    """What is needed of Starlette's WebSocket."""

    async def receive(self) -> MutableMapping[str, Any]: ...

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class Connection:
    """Runs one accepted websocket to its end. Lives on the event loop."""

    def __init__(
        self,
        websocket: WebSocket,
        table: SessionRegistry,
        *,
        resumes: bool = False,
        on_session: Callable[[], None] = lambda: None,
    ) -> None:
        """`resumes`: the first message is `session.resume`, no new session is made; `on_session`:
        there is one now."""
        self._websocket = websocket
        self._table = table
        self._resumes = resumes
        self._on_session = on_session
        self._limits = table.limits
        self._session: ClientSession
        self._sent = 0
        """Number of the last event that was sent."""
        self._greeting: str | None = None
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._overflowed: asyncio.Future[None] = loop.create_future()
        self._displaced: asyncio.Future[None] = loop.create_future()
        self._understood = resumes
        self._is_broken = False

    async def run(self) -> None:
        """Serves the connection; returns when it is closed. Its session may live on."""
        try:
            await (self._resume() if self._resumes else self._open())
        except EdgeVlmError as error:
            await refuse(self._websocket, error)
            return
        except _Gone:
            return
        self._on_session()
        sending = asyncio.create_task(self._send_loop())
        receiving = asyncio.create_task(self._receive_loop())
        try:
            await asyncio.wait(
                [sending, receiving, self._overflowed, self._displaced],
                return_when=asyncio.FIRST_COMPLETED,
            )
            if sending.done() and sending.exception() is not None:
                # The other side has gone; how, is about to be received.
                self._is_broken = True
                await asyncio.wait([receiving], timeout=GOODBYE_TIMEOUT_S)
        finally:
            await cancel(sending, receiving)
            sent, received = await asyncio.gather(sending, receiving, return_exceptions=True)
            if isinstance(sent, Exception):
                log.debug("nothing more could be sent: %r", sent)
            if isinstance(received, Exception):
                log.error("a connection failed", exc_info=received)
                await self._say_goodbye(1011, "the connection failed")
            await self._part()
            if self._session.viewer is self:  # or each would keep the other, and all its events
                self._session.viewer = None

    async def _open(self) -> None:
        self._session = await self._table.open()
        self._table.attach(self._session, self)

    async def _resume(self) -> None:
        try:
            message = await within(RESUME_TIMEOUT_S, self._websocket.receive())
        except asyncio.TimeoutError:
            raise ProtocolError("no session.resume came") from None
        if message["type"] == "websocket.disconnect":
            raise _Gone
        wanted = protocol.decode_client_message(message.get("text") or message.get("bytes") or b"")
        if not isinstance(wanted, protocol.SessionResume):
            raise ProtocolError("the first message of this connection must be session.resume")
        session = self._table.find(wanted)
        self._session = session
        self._sent = wanted.last_sequence
        self._table.attach(session, self)
        self._table.metrics.resumes.inc()
        resumed = self._table.resumed(session, wanted.last_sequence)
        resumed.event_id = wanted.event_id
        self._greeting = protocol.encode(resumed)

    async def _part(self) -> None:
        """What becomes of the session."""
        session, table = self._session, self._table
        if self._displaced.done():
            await self._say_goodbye(1008, "another connection goes on with this session")
        elif self._overflowed.done():
            await table.end(session)
            await self._say_goodbye(1013, "the client reads too slowly")
        elif self._is_broken and session.viewer is self:
            table.leave(session)
        else:
            await table.end(session)

    async def _say_goodbye(self, code: int, reason: str) -> None:
        """The send loop may have been stuck, so it could not say it."""
        with suppress(Exception):
            await within(GOODBYE_TIMEOUT_S, self._websocket.close(code, reason))

    # ---- out ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something new in the log, or the session has ended."""
        self._news.set()
        if not self._session.log.covers(self._sent):
            resolve(self._overflowed, None)

    def displace(self) -> None:
        """Another connection has taken the session over."""
        resolve(self._displaced, None)

    async def _send_loop(self) -> None:
        session = self._session
        if self._greeting is not None:
            await self._websocket.send_text(self._greeting)
        while True:
            while self._sent < session.log.newest:
                await self._websocket.send_text(session.log.text(self._sent + 1))
                self._sent += 1
            if session.ending is not None:
                # RFC 6455 5.5: a control frame holds 125 bytes, two of them are the code.
                reason = session.ending.reason.encode()[:120].decode(errors="ignore")
                await self._websocket.close(session.ending.code, reason)
                return
            self._news.clear()
            await self._news.wait()

    # ---- in ----------------------------------------------------------------------------------

    async def _receive_loop(self) -> None:
        session = self._session
        if session.taking is not None:  # what an earlier connection has brought comes first
            await asyncio.shield(session.taking)
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                self._is_broken = message.get("code", 1006) in BROKEN_CODES
                return
            if self._displaced.done():
                return
            if session.ending is not None or session.handle is None:
                continue
            session.messages_received += 1
            data: str | bytes = message.get("text") or message.get("bytes") or b""
            session.taking = asyncio.create_task(self._take_or_refuse(data, session.handle))
            # It counts as received, so it is taken even if this connection breaks meanwhile.
            await asyncio.shield(session.taking)
            await self._wait_for_room(session)

    async def _take_or_refuse(self, data: str | bytes, handle: SessionHandle) -> None:
        session = self._session
        try:
            await self._take(data, handle)
        except ProtocolError as error:
            event_id = protocol.event_id_of(data) if isinstance(data, str) else None
            session.send(protocol.error_event(error, event_id=event_id))
            if error.close_code is not None:
                session.end(error.close_code, str(error))
            elif isinstance(data, bytes) and not self._understood:
                session.end(1003, str(error))

    async def _wait_for_room(self, session: ClientSession) -> None:
        """Until the engines have come to enough of the messages."""
        handle = session.handle
        if handle is not None:
            await self._until(lambda: handle.num_waiting <= MAX_WAITING_CALLS)

    async def _until(self, is_met: Callable[[], bool]) -> None:
        """Or until the session has ended."""
        session = self._session
        while session.ending is None and session.handle is not None and not is_met():
            session.progress.clear()
            await session.progress.wait()

    async def _take(self, data: str | bytes, handle: SessionHandle) -> None:
        if len(data) > self._limits.max_message_bytes:
            raise MessageTooLarge(
                f"a message of {len(data)} bytes",
                remedy=f"the limit is {self._limits.max_message_bytes}",
            )
        if isinstance(data, bytes):
            self._take_frame(protocol.decode_frame_message(data), handle)
        else:
            await self._take_message(protocol.decode_client_message(data), handle)
        self._understood = True

    def _take_frame(self, message: protocol.FrameMessage, handle: SessionHandle) -> None:
        refused: FrameDecodeError | None = None
        try:
            picture = message.picture()
        except FrameDecodeError as error:
            picture, refused = bytes(message.payload), error
        is_raw = message.kind == protocol.TYPE_RAW
        frame = EncodedFrame(
            seq=message.sequence,
            capture_us=message.capture_time_us,
            received_ns=self._table.clock_ns(),
            data=picture,
            encoding=Encoding.RAW if is_raw else Encoding.JPEG,
        )
        self._put(frame, handle, refused)

    def _put(
        self, frame: EncodedFrame, handle: SessionHandle, refused: FrameDecodeError | None = None
    ) -> None:
        self._table.metrics.frames_received.inc()
        self._session.heard_ns = self._table.clock_ns()
        self._session.put(frame, refused)

    def _next_frame(
        self, data: bytes, encoding: Encoding, capture_us: int | None = None
    ) -> EncodedFrame:
        """A picture without a number; without a time it goes on from that of the newest frame."""
        session, now_ns = self._session, self._table.clock_ns()
        if capture_us is None:
            newest_us, came_ns = session.newest_time or (now_ns // 1000, now_ns)
            passed_us = max((now_ns - came_ns) // 1000, 1)
            capture_us = newest_us + (passed_us if session.newest_time is not None else 0)
        return EncodedFrame(
            seq=(session.newest_frame_sequence or 0) + 1,
            capture_us=capture_us,
            received_ns=now_ns,
            data=data,
            encoding=encoding,
        )

    async def _take_item(
        self, message: protocol.ConversationItemCreate, handle: SessionHandle
    ) -> None:
        """Its pictures become frames that none drops, its text waits. Raises MediaRefused before
        anything is taken."""
        pictures = [
            (
                await asyncio.to_thread(
                    inline_picture, part.image_url, f"item.content[{number}].image_url"
                ),
                part,
            )
            for number, part in enumerate(message.item.content)
            if isinstance(part.image_url, str)
        ]
        session = self._session
        session.heard_ns = self._table.clock_ns()
        for data, part in pictures:
            await self._until(lambda: handle.has_room)
            at_us = part.capture_time_us if isinstance(part.capture_time_us, int) else None
            frame = self._next_frame(data, Encoding.STILL, at_us)
            session.stills_under_way.add(frame.seq)
            self._put(frame, handle)
        if pictures:
            message.item = without_pictures(message.item)
        handle.take(message)

    async def _take_message(self, message: protocol.ClientMessage, handle: SessionHandle) -> None:
        session = self._session
        if isinstance(message, protocol.InputVideoFrameAppend):
            picture = protocol.frame_message(
                message.sequence, message.capture_time_us, message.frame
            )
            self._take_frame(picture, handle)
        elif isinstance(message, protocol.InputImageBufferAppend):
            self._put(self._next_frame(message.image, Encoding.JPEG), handle)
        elif isinstance(message, protocol.ConversationItemCreate):
            await self._take_item(message, handle)
        elif isinstance(message, protocol.Ping):  # no sign of somebody who watches
            session.send(protocol.Pong(event_id=message.event_id))
        elif isinstance(message, protocol.SessionClose):
            await self._table.end_engines_side(session)
            session.send(protocol.SessionClosed(reason="the client closed it"))
            session.end(1000, "closed by the client")
        elif isinstance(message, protocol.SessionResume):
            raise ProtocolError(
                "session.resume must be the first message", remedy="connect with ?resume=1"
            )
        elif isinstance(message, protocol.ResponseCreate) and self._table.draining:
            error = ServerBusy("the server is stopping", remedy="connect again later")
            session.send(protocol.error_event(error, event_id=message.event_id))
        else:
            session.heard_ns = self._table.clock_ns()
            if isinstance(message, protocol.SessionUpdate):
                await self._read_subtitles(message)
            if isinstance(message, protocol.ResponseCreate):
                session.shape.asked(message)
                await self._until(lambda: not session.stills_under_way)
            handle.take(message)

    async def _read_subtitles(self, message: protocol.SessionUpdate) -> None:
        """Those of a film take longer than others should wait for the engines."""
        subtitles = None
        with suppress(ConfigError):  # which the session tells
            subtitles = message.session.fields().get("subtitles")
        if isinstance(subtitles, str) and len(subtitles) > LONG_TEXT:
            await asyncio.to_thread(self._table.read_subtitles, subtitles)


class _Gone(Exception):
    """The other side left before it said anything."""


async def refuse(websocket: WebSocket, error: EdgeVlmError) -> None:
    """Says why there is no session, and closes."""
    code = 1011
    if isinstance(error, ServerBusy):
        code = 1013
    elif isinstance(error, (SessionError, ProtocolError, Unauthorized)):
        code = 1008
    with suppress(Exception):  # the other side may be gone already
        await websocket.send_text(protocol.encode(protocol.error_event(error)))
        await websocket.close(code, str(error).encode()[:120].decode(errors="ignore"))
