"""A session's websocket as the client sees it: it breaks, and comes back where it stopped.

What was sent is kept until an event shows that it arrived; after a break the server says how much
arrived, and the rest is sent again in order. Events carry numbers, so that none is taken twice and
a gap is noticed. websockets is imported only here.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    MessageTooLarge,
    MissingExtraError,
    ProtocolError,
    ReplayLost,
    ServerBusy,
    ServerUnreachable,
    SessionGone,
    UnknownMessageType,
)
from edge_vlm.json_text import MALFORMED, parse_json
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.address import websocket_url
from edge_vlm_runtime.client.bounds import MOST_RECONNECT_S, check_event, check_opening
from edge_vlm_runtime.protocol.base import UnknownEvent, unknown_event
from edge_vlm_runtime.protocol.messages import error_from_detail as error_from_detail
from edge_vlm_runtime.sources.masking import mask_credentials

try:
    import websockets
    from websockets.asyncio.client import ClientConnection, connect
except ImportError as error:
    raise MissingExtraError.for_library("websockets", "client") from error

log = logging.getLogger(__name__)

MAX_EVENT_BYTES = 4 << 20
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
TROUBLE_CODE = 1011
"""Of a close frame from a server that gave up on a connection: the session may still be there."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """What a client must remember to go on with its session, even from another process."""

    session_id: str
    resume_token: str
    last_sequence: int


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach a server that asks for more than its address."""

    api_key: str | None = None
    ca_file: Path | None = None
    """Certificate to trust for wss://, such as the one the server made for itself."""

    def __post_init__(self) -> None:
        """Raises ConfigError, without the key in it."""
        key = self.api_key
        if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
            raise ConfigError(
                "an API key has letters, digits and signs of ASCII only", remedy="check the key"
            )


@dataclass(frozen=True)
class _Sent:
    number: int
    key: str
    data: str | bytes


class ResumableConnection:
    """One reader; several tasks may send."""

    def __init__(
        self,
        url: str,
        access: Access,
        connection: ClientConnection,
        opening: protocol.SessionCreated | protocol.SessionResumed,
        point: ResumePoint,
        *,
        reconnect: bool,
    ) -> None:
        self._url = url
        self._access = access
        self._connection = connection
        self.opening = opening
        """The first event."""
        check_opening(opening)
        self._num_cells = opening.model.limits.num_cells
        self._point = point
        self._last_sequence = point.last_sequence
        grace_s = min(opening.limits.resume_grace_s, MOST_RECONNECT_S)
        self._reconnect_s = grace_s if reconnect else 0.0
        self._sending = asyncio.Lock()
        self._num_sent = 0
        if isinstance(opening, protocol.SessionResumed):
            self._num_sent = opening.messages_received
        self._unconfirmed: deque[_Sent] = deque()
        self.reconnects = 0
        """How often it broke and came back."""

    @classmethod
    async def open(cls, url: str, access: Access, *, reconnect: bool) -> ResumableConnection:
        """A new session; `url`: see `address`. Raises ServerUnreachable, ServerBusy, ProtocolError,
        ConfigError, and whatever else the server answers with."""
        url = websocket_url(url)
        connection = await _connect(url, access)
        first = await _first_event(connection)
        if not isinstance(first, protocol.SessionCreated):
            await connection.close()
            raise ProtocolError(f"the server began with {name_of(first)}")
        point = ResumePoint(
            session_id=first.session_id,
            resume_token=first.resume_token,
            last_sequence=first.sequence,
        )
        return cls(url, access, connection, first, point, reconnect=reconnect)

    @classmethod
    async def resume(
        cls, url: str, access: Access, point: ResumePoint, *, reconnect: bool
    ) -> ResumableConnection:
        """Goes on with a session. Raises as `open`, SessionGone, ReplayLost."""
        url = websocket_url(url)
        connection, resumed = await _resume(url, access, point)
        return cls(url, access, connection, resumed, point, reconnect=reconnect)

    @property
    def point(self) -> ResumePoint:
        """Where another process could go on, behind the event received last."""
        return ResumePoint(
            session_id=self._point.session_id,
            resume_token=self._point.resume_token,
            last_sequence=self._last_sequence,
        )

    async def send(self, data: str | bytes, key: str) -> None:
        """Sends a message, at the latest when the line is back. `key`: `frame_key` of a frame, the
        `event_id` of any other message. Raises what ended the connection for good."""
        async with self._sending:
            self._num_sent += 1
            self._unconfirmed.append(_Sent(self._num_sent, key, data))
            try:
                await self._connection.send(data)
            except websockets.ConnectionClosed as closed:
                if not self._comes_back(closed):
                    raise closed_error(closed) from closed

    async def receive(self) -> protocol.ServerEvent:
        """The next event. Raises what ended the connection for good, ProtocolError."""
        while True:
            try:
                event = _decode_event(await self._connection.recv())
            except websockets.ConnectionClosed as closed:
                await self._come_back(closed)
                continue
            if self._is_new(event):
                check_event(event, self._num_cells)
                self._confirm(event)
                return event

    async def close(self) -> None:
        """Closes the connection as it is."""
        await self._connection.close()

    # ---- numbers -----------------------------------------------------------------------------

    def _is_new(self, event: protocol.ServerEvent) -> bool:
        if event.sequence == 0:  # about the connection, not one of the session's
            return True
        if event.sequence <= self._last_sequence:
            return False
        if event.sequence != self._last_sequence + 1:
            raise ProtocolError(
                f"event {event.sequence} came behind {self._last_sequence}: some are missing"
            )
        self._last_sequence = event.sequence
        return True

    def _confirm(self, event: protocol.ServerEvent) -> None:
        """An event about a message shows that it and all before it arrived."""
        key: str | None = getattr(event, "event_id", None)
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            key = frame_key(event.frame_sequence)
        elif isinstance(event, protocol.Error):
            key = event.error.event_id
        for index, sent in enumerate(self._unconfirmed):
            if sent.key == key:
                for _ in range(index + 1):
                    self._unconfirmed.popleft()
                return

    # ---- coming back -------------------------------------------------------------------------

    def _comes_back(self, closed: websockets.ConnectionClosed) -> bool:
        broken = closed.rcvd is None or closed.rcvd.code == TROUBLE_CODE
        return broken and self._reconnect_s > 0

    async def _come_back(self, closed: websockets.ConnectionClosed) -> None:
        """Raises what ended the connection if it cannot be had again."""
        if not self._comes_back(closed):
            raise closed_error(closed) from closed
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._reconnect_s
        pause_s = FIRST_PAUSE_S
        log.warning("the connection broke, trying again for %g s", self._reconnect_s)
        while True:
            try:
                connection, resumed = await _resume(self._url, self._access, self.point)
                break
            except (SessionGone, ReplayLost) as error:
                if closed.rcvd is not None:  # the server had said why it ended the session
                    raise closed_error(closed) from error
                raise
            except ServerUnreachable as error:
                if loop.time() + pause_s > deadline:
                    raise closed_error(closed) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        async with self._sending:
            while self._unconfirmed and self._unconfirmed[0].number <= resumed.messages_received:
                self._unconfirmed.popleft()
            self._connection = connection
            self.reconnects += 1
            log.warning("connected again, %d messages are sent anew", len(self._unconfirmed))
            with suppress(websockets.ConnectionClosed):  # `receive` notices it
                for sent in self._unconfirmed:
                    await connection.send(sent.data)


def frame_key(sequence: int) -> str:
    """Key of a frame, see `ResumableConnection.send`."""
    return f"frame {sequence}"


class _StaysHere(connect):
    """A redirection is an error: the key would go along to wherever it leads."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def _connect(url: str, access: Access) -> ClientConnection:
    headers = {} if access.api_key is None else {"Authorization": f"Bearer {access.api_key}"}
    try:
        extra: dict[str, Any] = {}
        if access.ca_file is not None and url.startswith("wss:"):
            extra["ssl"] = ssl.create_default_context(cafile=access.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"not a certificate ({error})", where=access.ca_file) from error
    try:
        return await _StaysHere(
            url,
            additional_headers=headers,
            max_size=MAX_EVENT_BYTES,
            compression=None,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            proxy=None,
            **extra,
        )
    except (OSError, TimeoutError, websockets.WebSocketException, ValueError) as error:
        if isinstance(error, websockets.InvalidStatus):
            with suppress(*MALFORMED):  # it may be no server of ours
                told = parse_json(error.response.body or b"")["error"]
                detail = protocol.ErrorDetail(
                    type="", code=str(told["code"]), message=str(told["message"])
                )
                raise error_from_detail(detail) from error
        raise ServerUnreachable(
            f"no edge-vlm server answers: {error}",
            where=mask_credentials(url),
            remedy="start `edge-vlm serve`",
        ) from error


async def _resume(
    url: str, access: Access, point: ResumePoint
) -> tuple[ClientConnection, protocol.SessionResumed]:
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, f"{protocol.RESUME_PARAMETER}=1"]))
    connection = await _connect(urlunsplit(parts._replace(query=query)), access)
    wanted = protocol.SessionResume(
        session_id=point.session_id,
        resume_token=point.resume_token,
        last_sequence=point.last_sequence,
    )
    with suppress(websockets.ConnectionClosed):  # what it said before is read below
        await connection.send(protocol.encode(wanted))
    first = await _first_event(connection)
    if not isinstance(first, protocol.SessionResumed):
        await connection.close()
        raise ProtocolError(f"the server began with {name_of(first)}")
    return connection, first


async def _first_event(connection: ClientConnection) -> protocol.ServerEvent:
    """Raises what the server says instead."""
    try:
        text = await within(OPEN_TIMEOUT_S, connection.recv())
        event = _decode_event(text)
    except websockets.ConnectionClosed as closed:
        raise closed_error(closed) from closed
    except asyncio.TimeoutError as error:
        await connection.close()
        raise ServerUnreachable("the server says nothing") from error
    except BaseException:
        await connection.close()
        raise
    if isinstance(event, protocol.Error):
        await connection.close()
        raise error_from_detail(event.error)
    return event


def _decode_event(text: str | bytes) -> protocol.ServerEvent:
    """An UnknownEvent for what only a newer version knows. Raises ProtocolError."""
    try:
        return protocol.decode_server_event(text)
    except UnknownMessageType:
        return unknown_event(text)


def name_of(event: protocol.ServerEvent) -> str:
    """What stood as `type` in it."""
    return event.name if isinstance(event, UnknownEvent) else protocol.tag_of(type(event))


def closed_error(closed: websockets.ConnectionClosed) -> EdgeVlmError:
    """What a closed connection means."""
    code = closed.rcvd.code if closed.rcvd is not None else None
    reason = closed.rcvd.reason if closed.rcvd is not None else ""
    if code == 1009:
        return MessageTooLarge(reason or "a message was too large for the server")
    if code == 1013:
        return ServerBusy(reason or "the server is busy")
    if code == 1003:
        return ProtocolError(reason or "the server does not understand these messages")
    if code is None:
        return ServerUnreachable("the connection broke")
    return ServerUnreachable(f"the server closed the session ({code}): {reason}".rstrip(": "))
