"""One websocket: messages in, events out, and the ways it can end.

1000  the client closed the session        1009  a message above the limit
1001  the server is stopping               1011  a bug of ours ended the session
1003  nothing but binary garbage so far    1013  no free session, or the client reads too slowly
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import edge_vlm
from edge_vlm.errors import (
    EdgeVlmError,
    FrameDecodeError,
    MessageTooLarge,
    ProtocolError,
    ServerBusy,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.frame_slot import WaitingFrame
from edge_vlm_runtime.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.worker import EngineWorker, SessionHandle

log = logging.getLogger(__name__)

MAX_OUTBOX_EVENTS = 2000
"""Events a client may leave unread before it is disconnected."""
GOODBYE_TIMEOUT_S = 1.0


class WebSocket(Protocol):
    """What is needed of Starlette's WebSocket."""

    async def receive(self) -> MutableMapping[str, Any]: ...

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


@dataclass(frozen=True)
class _Close:
    code: int
    reason: str


class Connection:
    """Runs one accepted websocket to its end. Lives on the event loop."""

    def __init__(
        self,
        websocket: WebSocket,
        *,
        worker: EngineWorker,
        bundle_name: str,
        settings: SessionSettings,
        model: ModelLimits,
        limits: ServerLimits,
    ) -> None:
        self._websocket = websocket
        self._worker = worker
        self._bundle_name = bundle_name
        self._settings = settings
        self._model = model
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[protocol.ServerEvent | _Close] = asyncio.Queue()
        self._sequence = 0
        self._overflowed: asyncio.Future[None] = self._loop.create_future()
        self._closing = False
        self._draining = False
        self._understood = False
        self._handle: SessionHandle | None = None

    async def run(self) -> None:
        """Serves the connection; returns when it is closed and its session has ended."""
        opened: asyncio.Future[SessionHandle | EdgeVlmError] = self._loop.create_future()
        self._worker.open_session(
            self._settings,
            emit=lambda event: self._from_engines(self._send, event),
            on_open=lambda result: self._from_engines(_resolve, opened, result),
            on_failure=lambda: self._from_engines(self._close, 1011, "the session failed"),
        )
        result = await opened
        if isinstance(result, EdgeVlmError):
            self._send(protocol.error_event(result))
            self._close(1011, result.code)
            await self._send_loop()
            return
        self._handle = result
        self._send(
            protocol.SessionCreated(
                session_id=secrets.token_hex(8),
                protocol_version=protocol.PROTOCOL_VERSION,
                server=f"edge-vlm {edge_vlm.__version__}",
                model=protocol.Model(bundle=self._bundle_name, limits=self._model),
                settings=self._settings,
                limits=self._limits,
            )
        )
        tasks = [
            asyncio.create_task(self._send_loop()),
            asyncio.create_task(self._receive_loop()),
        ]
        try:
            await asyncio.wait([*tasks, self._overflowed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end_session()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for outcome in results:
                if isinstance(outcome, Exception):
                    log.debug("connection ended by %r", outcome)
        if self._overflowed.done():  # the send loop may have been stuck, so it could not say it
            with suppress(Exception):
                goodbye = self._websocket.close(1013, "the client reads too slowly")
                await asyncio.wait_for(goodbye, GOODBYE_TIMEOUT_S)

    async def drain(self, time_left_s: float) -> None:
        """Lets the answers under way end, then closes with 1001."""
        self._draining = True
        self._send(protocol.SessionGoAway(time_left_s=time_left_s))
        deadline = self._loop.time() + time_left_s
        while self._handle is not None and self._handle.is_answering:
            if self._loop.time() >= deadline or self._closing:
                break
            await asyncio.sleep(0.02)
        await self._end_session()
        self._send(protocol.SessionClosed(reason="the server is stopping"))
        self._close(1001, "the server is stopping")

    # ---- out ---------------------------------------------------------------------------------

    def _from_engines(self, call: Callable[..., None], *args: object) -> None:
        """Runs `call` on the event loop; the engine thread never waits for a socket."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _send(self, event: protocol.ServerEvent) -> None:
        if self._closing:
            return
        self._sequence += 1
        event.sequence = self._sequence
        self._outbox.put_nowait(event)
        if self._outbox.qsize() > MAX_OUTBOX_EVENTS:
            self._closing = True
            _resolve(self._overflowed, None)

    def _close(self, code: int, reason: str) -> None:
        if not self._closing:
            self._closing = True
            self._outbox.put_nowait(_Close(code, reason))

    async def _send_loop(self) -> None:
        while True:
            item = await self._outbox.get()
            if isinstance(item, _Close):
                # RFC 6455 5.5: a control frame holds 125 bytes, two of them are the code.
                reason = item.reason.encode()[:120].decode(errors="ignore")
                await self._websocket.close(item.code, reason)
                return
            await self._websocket.send_text(protocol.encode(item))

    async def _end_session(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        ended: asyncio.Future[None] = self._loop.create_future()
        self._worker.close_session(handle, lambda: self._from_engines(_resolve, ended, None))
        await ended

    # ---- in ----------------------------------------------------------------------------------

    async def _receive_loop(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if self._closing or self._handle is None:
                continue
            data: str | bytes = message.get("text") or message.get("bytes") or b""
            try:
                await self._take(data, self._handle)
            except ProtocolError as error:
                event_id = protocol.event_id_of(data) if isinstance(data, str) else None
                self._send(protocol.error_event(error, event_id=event_id))
                if error.close_code is not None:
                    self._close(error.close_code, str(error))
                elif isinstance(data, bytes) and not self._understood:
                    self._close(1003, str(error))

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
        frame = WaitingFrame(
            sequence=message.sequence,
            capture_time_us=message.capture_time_us,
            jpeg=message.payload,
            received_ns=self._worker.clock_ns(),
        )
        if message.payload_length == len(message.payload):
            handle.put_frame(frame)
            return
        error = FrameDecodeError(
            f"the header announces {message.payload_length} bytes, {len(message.payload)} came"
        )
        handle.refuse_frame(frame, error)

    async def _take_message(self, message: protocol.ClientMessage, handle: SessionHandle) -> None:
        if isinstance(message, protocol.InputVideoFrameAppend):
            picture = protocol.frame_message(
                message.sequence, message.capture_time_us, message.frame
            )
            self._take_frame(picture, handle)
        elif isinstance(message, protocol.Ping):
            self._send(protocol.Pong(event_id=message.event_id))
        elif isinstance(message, protocol.SessionClose):
            await self._end_session()
            self._send(protocol.SessionClosed(reason="the client closed it"))
            self._close(1000, "closed by the client")
        elif isinstance(message, protocol.ResponseCreate) and self._draining:
            error = ServerBusy("the server is stopping", remedy="connect again later")
            self._send(protocol.error_event(error, event_id=message.event_id))
        else:
            handle.take(message)


def _resolve(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)
