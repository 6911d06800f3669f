"""What carries the application: uvicorn, with what neither it nor ASGI offers."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.waiting import cancel
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.access import doors
from edge_vlm_runtime.server.access.addresses import TrustedProxies
from edge_vlm_runtime.server.access.doors import Doors, Stage, Visitor
from edge_vlm_runtime.server.access.tls import Tls
from edge_vlm_runtime.server.intake import PING, Allowance, FrameCutter

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "uvicorn", "serve") from error

log = logging.getLogger(__name__)

VISITOR = "edge_vlm.visitor"
"""Key of the `Visitor` in the state of an ASGI scope."""
DOORS = "edge_vlm.doors"
PING_INTERVAL_S = 20.0
HEADERS_S = 30.0
"""For a request up to the end of its headers; whoever needs longer is told 408 and cut off."""
HANDSHAKE_S = 15.0
"""For that of TLS."""
GOODBYE_BYTES = 256 << 10
"""That are taken from a client after the websocket was closed; one that sends more is cut off."""
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\n"
    b"content-length: 0\r\n\r\n"
)
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
BACKLOG = 2048
"""Connections that the system keeps until they are taken in: one too many tries again only after a
second."""
AT_A_TIME = 8
"""Connections that are taken in before everybody else has a turn."""
SAID_FOR_S = 60.0
"""That descriptors have run out is not said again for so long."""
PAUSE_S = 0.1
"""After a connection could not be taken in."""


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
        visitors: Doors | None = None,
    ) -> None:
        """`visitors`: how many connections there may be (default: as `limits` say, and no proxy is
        trusted). `on_start` is called on the loop when the port answers, `on_signal` in the handler
        of the first SIGINT or SIGTERM."""
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
                proxy_headers=False,  # see TrustedProxies
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=2,
            )
        )
        self._on_start = on_start
        self._on_signal = on_signal
        self._signalled = False
        self._doors = visitors or Doors(
            limits.max_connections, limits.max_connections_per_address, TrustedProxies()
        )
        self._entrances: list[_Entrance] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        for listener in sockets or []:
            self._entrances.append(_Entrance(listener, self._doors, self.config, self._protocol))
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for entrance in self._entrances:
            await entrance.close()
        await super().shutdown(sockets)

    def _protocol(self, visitor: Visitor) -> asyncio.Protocol:
        return _HeadersInTime(
            config=self.config,
            server_state=self.server_state,
            app_state={**self.lifespan.state, VISITOR: visitor},
            doors=self._doors,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            self.should_exit = True
            self.force_exit = True
            return
        self._signalled = True
        self._on_signal()


class _Entrance:
    """Takes connections in from one listening socket, as many as the doors let in.

    asyncio's own servers take in whoever comes, and when descriptors run out they say so thousands
    of times a second.
    """

    def __init__(
        self,
        listener: socket.socket,
        visitors: Doors,
        config: uvicorn.Config,
        protocol: Callable[[Visitor], asyncio.Protocol],
    ) -> None:
        self._listener = listener
        self._doors = visitors
        self._ssl = config.ssl
        self._protocol = protocol
        self._spare: int | None = None
        self._said_at_s = float("-inf")
        listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._carried: set[asyncio.Task[Any]] = set()
        self._take_spare()
        self._tasks = [self._loop.create_task(self._run()), self._loop.create_task(self._sweep())]

    async def close(self) -> None:
        """Nobody comes in any more. Those who are in stay."""
        await cancel(*self._tasks, *self._carried)
        self._drop_spare()

    async def _run(self) -> None:
        for number in itertools.count(1):
            try:
                connection, peer = await self._loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    await self._out_of_descriptors(error)
                elif error.errno != errno.ECONNABORTED:
                    log.warning("a connection could not be taken in: %s", error)
                    await asyncio.sleep(PAUSE_S)
                continue
            self._take_in(connection, str(peer[0]))
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)  # the others' turn, however many wait outside

    def _take_in(self, connection: socket.socket, peer: str) -> None:
        visitor = self._doors.let_in(peer)
        if visitor is None:
            with connection, suppress(OSError):
                connection.setblocking(False)
                if self._ssl is None:
                    connection.send(FULL)
            return
        # Up to the end of the handshake.
        work = self._loop.connect_accepted_socket(
            lambda: self._protocol(visitor),
            connection,
            ssl=self._ssl,
            ssl_handshake_timeout=None if self._ssl is None else HANDSHAKE_S,
        )
        task = self._loop.create_task(work)
        visitor.cut = task.cancel
        self._carried.add(task)
        task.add_done_callback(lambda task: self._carried_in(task, connection, visitor))

    def _carried_in(
        self, task: asyncio.Task[Any], connection: socket.socket, visitor: Visitor
    ) -> None:
        """Or not: then nobody else closes the connection, if the task was cut before it began."""
        self._carried.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            return
        connection.close()
        self._doors.leave(visitor)
        if isinstance(error, OSError):
            log.debug("a connection came to nothing: %r", error)
        elif error is not None:
            log.error("a connection could not be taken in", exc_info=error)

    async def _out_of_descriptors(self, error: OSError) -> None:
        """Somebody else gives way, or the one who came is told so."""
        if self._loop.time() - self._said_at_s > SAID_FOR_S:
            self._said_at_s = self._loop.time()
            log.error(
                "no connection can be taken in: %s; raise the limit of open files (ulimit -n) or "
                "lower --max-connections",
                error.strerror,
            )
        if not self._doors.make_room() and self._spare is not None:
            self._drop_spare()
            with suppress(OSError):
                connection, _ = self._listener.accept()
                connection.close()
            self._take_spare()
        await asyncio.sleep(PAUSE_S)

    def _take_spare(self) -> None:
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _drop_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(doors.SWEEP_S)
            self._doors.sweep(self._loop.time())


class _HeadersInTime(H11Protocol):
    """uvicorn waits for ever for the second half of a request's headers, and for the rest of a body
    that it has answered already."""

    _deadline: asyncio.TimerHandle | None = None
    _is_websocket = False

    def __init__(self, *, doors: Doors, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._doors = doors
        self._visitor: Visitor = self.app_state[VISITOR]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._visitor.carrier = transport
        self._visitor.cut = transport.abort
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._doors.leave(self._visitor)
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._visitor.is_taken = True
        super().resume_writing()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._is_websocket = True
        self.app_state = {**self.app_state, DOORS: self._doors}
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        self._visitor.stage = Stage.BETWEEN
        super().on_response_complete()
        self._watch_headers()

    @property
    def _is_asking(self) -> bool:
        """A request has come, up to the end of its headers, and is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_headers(self) -> None:
        if self._is_asking:
            self._visitor.stage = Stage.SERVED
        if self._is_asking or self._is_websocket or self.transport.is_closing():
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


class _BoundedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn answers pings of a client that reads nothing, and keeps the answers."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._doors: Doors = self.app_state[DOORS]
        self._visitor: Visitor = self.app_state[VISITOR]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._visitor.stage = Stage.STRANGER
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._doors.leave(self._visitor)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Who does not read is not listened to: whatever it says would have to be answered."""
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self._visitor.is_taken = True
        super().resume_writing()
        if self._is_listened_to:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        message = await super().receive()  # which reads on when its queue is empty
        if not self._is_listened_to:
            self.transport.pause_reading()
        return message

    @property
    def _is_listened_to(self) -> bool:
        return self.writable.is_set() and not self.read_paused

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # it was refused in full; else that is logged as a bug


def _bounded(messages_per_s: int) -> type[asyncio.Protocol]:
    """uvicorn's websocket for clients that mean harm: it parses all that a socket hands over at
    once, answers pings whether or not anybody reads, and reads on after it has said goodbye."""

    class Bounded(_BoundedWebSocket):
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
            if self._is_listened_to and not self.transport.is_closing():
                self.transport.resume_reading()

        @property
        def _is_listened_to(self) -> bool:
            return not self._is_held and super()._is_listened_to

        def resume_writing(self) -> None:
            super().resume_writing()
            self._go_on()

        def keepalive_timeout(self) -> None:
            super().keepalive_timeout()
            if self.close_sent:  # whoever is gone does not read the rest
                self.transport.abort()

    return Bounded


def listen(host: str, port: int) -> socket.socket:
    """A socket for `serve`; port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it on, every event
    # that follows another one waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
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
