"""What carries the application: uvicorn, with what neither it nor ASGI offers."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.access.tls import Tls
from edge_vlm_runtime.server.intake import PING, Allowance, FrameCutter

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "uvicorn", "serve") from error

PING_INTERVAL_S = 20.0
HEADERS_S = 30.0
"""For a request up to the end of its headers; whoever needs longer is told 408 and cut off."""
GOODBYE_BYTES = 256 << 10
"""That are taken from a client after the websocket was closed; one that sends more is cut off."""
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class AsgiServer(uvicorn.Server):
    """Lets its owner drain before it stops; a second signal stops it at once."""

    def __init__(
        self,
        application: Any,
        limits: ServerLimits,
        tls: Tls | None,
        *,
        on_start: Callable[[], None],
        on_signal: Callable[[], None],
    ) -> None:
        """`on_start` is called on the loop when the port answers, `on_signal` in the handler of
        the first SIGINT or SIGTERM."""
        super().__init__(
            uvicorn.Config(
                application,
                http=_HeadersInTime,
                ws=_bounded(limits.max_messages_per_s),
                # Twice the announced limit: just above it the client gets a typed error first.
                ws_max_size=2 * limits.max_message_bytes,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_INTERVAL_S,
                ws_per_message_deflate=False,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=2,
            )
        )
        self._on_start = on_start
        self._on_signal = on_signal
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            self.should_exit = True
            self.force_exit = True
            return
        self._signalled = True
        self._on_signal()

    def transport_of(self, client: tuple[str, int] | None) -> asyncio.Transport | None:
        """What carries the connection from this address."""
        for carrier in self.server_state.connections:
            transport = getattr(carrier, "transport", None)
            if isinstance(transport, asyncio.Transport) and client is not None:
                peer = transport.get_extra_info("peername")
                if peer is not None and tuple(peer[:2]) == tuple(client):
                    return transport
        return None


def _bounded(messages_per_s: int) -> type[asyncio.Protocol]:
    """uvicorn's websocket for clients that mean harm: it parses all that a socket hands over at
    once, answers pings whether or not anybody reads, and reads on after it has said goodbye."""

    class Bounded(WebSocketsSansIOProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._cutter = FrameCutter()
            self._allowance = Allowance(messages_per_s, self.loop.time)
            self._is_held = False
            """Nothing is read until `_go_on`."""
            self._waking: asyncio.TimerHandle | None = None
            self._unheard_bytes = 0

        def data_received(self, data: bytes) -> None:
            if not self.handshake_initiated:  # the request, from the protocol before this one
                super().data_received(data)
                return
            if self.close_sent:
                self._unheard_bytes += len(data)
                if self._unheard_bytes > GOODBYE_BYTES:
                    self.transport.abort()
                    return
            self._cutter.push(data)
            if not self._is_held:
                self._read()

        def _read(self) -> None:
            """What has come, as far as it is allowed."""
            while not self.transport.is_closing():
                head = self._cutter.head
                if head is not None:
                    if head.opcode == PING and not self.writable.is_set():
                        self._hold()
                        return
                    if not self._allowance.take(head.cost):
                        if self.close_sent:
                            self.transport.abort()
                            return
                        self._hold()
                        if self._waking is None:
                            wait_s = self._allowance.wait_s
                            self._waking = self.loop.call_later(wait_s, self._wake)
                        return
                piece = self._cutter.cut()
                if not piece:
                    return
                super().data_received(piece)

        def _hold(self) -> None:
            self._is_held = True
            self.transport.pause_reading()

        def _wake(self) -> None:
            self._waking = None
            self._go_on()

        def _go_on(self) -> None:
            if not self._is_held or self.transport.is_closing():
                return
            self._is_held = False
            self._read()
            if not self._is_held and not self.read_paused and not self.transport.is_closing():
                self.transport.resume_reading()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._go_on()

        async def receive(self) -> Any:
            message = await super().receive()  # which reads on when its queue is empty
            if self._is_held:
                self.transport.pause_reading()
            return message

        def keepalive_timeout(self) -> None:
            super().keepalive_timeout()
            if self.close_sent:  # whoever is gone does not read the rest
                self.transport.abort()

    return Bounded


class _HeadersInTime(H11Protocol):
    """uvicorn waits for ever for the second half of a request's headers."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self._give_up)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        begun = bool(self.conn.trailing_data[0])
        if begun and not self.transport.is_closing():
            self.transport.write(TOO_SLOW)
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket for `serve`; port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it on, every event
    # that follows another one waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(64)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        is_host = isinstance(error, socket.gaierror) or (
            getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        )
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}",
            remedy=f"choose another {'--host' if is_host else '--port'}",
        ) from error
    return listener
