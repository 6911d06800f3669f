"""The HTTP and websocket server around one engine worker.

`Server.open` loads and warms up the engines; `serve` runs on this thread until SIGTERM or Ctrl-C,
`start`/`stop` run it on a thread of its own (for commands that bring their own server, and tests).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType, TracebackType
from urllib.parse import urlsplit

import edge_vlm
from edge_vlm.errors import ConfigError, MissingExtraError, ServerBusy, Unauthorized
from edge_vlm.metrics import CONTENT_TYPE
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.recording.recorder import Recorder
from edge_vlm_runtime.server.auth import SUBPROTOCOL, require_key
from edge_vlm_runtime.server.connection import Connection, refuse
from edge_vlm_runtime.server.sessions import OnEvent, SessionRegistry
from edge_vlm_runtime.server.tls import Tls
from edge_vlm_runtime.session.budget import default_settings, video_window

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocket
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "starlette", "ort") from error

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/fresh.js": ("fresh.js", "text/javascript; charset=utf-8"),
    "/line.js": ("line.js", "text/javascript; charset=utf-8"),
    "/points.js": ("points.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; "
        "img-src 'self' blob: data:"
    ),
    "X-Content-Type-Options": "nosniff",
}
DRAIN_S = 5.0
CONNECTIONS_PER_SESSION = 4
"""Connections that have no session yet, or none any more, count too."""
PING_INTERVAL_S = 20.0
LINGER_S = 5.0
"""For the closing handshake of a websocket; then its connection is cut."""


class Server:
    """One bundle, one engine thread, one port. Use as a context manager or call `close`."""

    def __init__(
        self,
        engines: LoadedBundle,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: ServerLimits | None = None,
        settings: SessionSettings | None = None,
        recorder: Recorder | None = None,
        on_event: OnEvent | None = None,
        api_key: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        """Port 0 takes a free one; `on_event` gets a session's name and every event of it, on the
        server's loop; with `api_key` a client must have it, see `api_key`. Raises ConfigError when
        host and port cannot be listened on, or the settings do not fit the model."""
        self.limits = limits or ServerLimits()
        self.settings = settings or default_settings(engines.bundle, self.limits)
        self.model = ModelLimits.from_bundle(engines.bundle)
        video_window(self.settings, self.model, self.limits)  # raises if it cannot be held to
        self._engines = engines
        self._worker = EngineWorker(engines, self.limits)
        self._socket = _listen(host, port)
        self._api_key = api_key
        self._is_tls = tls is not None
        self.host = host
        self.port = int(self._socket.getsockname()[1])
        self._connections: set[Connection] = set()
        self._table = SessionRegistry(
            worker=self._worker,
            bundle_name=engines.bundle.name,
            settings=self.settings,
            model=self.model,
            limits=self.limits,
            recorder=recorder,
            on_event=on_event,
        )
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._application(),
                ws="websockets-sansio",
                # Twice the announced limit: just above it the client gets a typed error first.
                ws_max_size=2 * self.limits.max_message_bytes,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_INTERVAL_S,
                ws_per_message_deflate=False,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=2,
            ),
            on_signal=self._on_signal,
        )

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        threads: int = 2,
        backend: Backend = Backend.ORT,
        engines: str | os.PathLike[str] | None = None,
        limits: ServerLimits | None = None,
        record_to: Path | None = None,
        on_event: OnEvent | None = None,
        api_key: str | None = None,
        tls: Tls | None = None,
    ) -> Server:
        """Checks and loads the bundle. `engines`: see `open_graphs`; `record_to`: a folder for a
        recording of each session, or the file for that of the only one; the rest: see `__init__`.
        Raises what `LoadedBundle.open` raises, ConfigError."""
        opened = LoadedBundle.open(bundle, threads, backend, engines)
        try:
            warm_up(opened)
            recorder = None
            if record_to is not None:
                recorder = Recorder(path=record_to, bundle=opened.bundle, threads=threads)
            return cls(
                opened,
                host=host,
                port=port,
                limits=limits,
                recorder=recorder,
                on_event=on_event,
                api_key=api_key,
                tls=tls,
            )
        except BaseException:
            opened.close()
            raise

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"{'wss' if self._is_tls else 'ws'}://{self._authority}{protocol.PATH}"

    @property
    def page_url(self) -> str:
        return f"{'https' if self._is_tls else 'http'}://{self._authority}/"

    @property
    def _authority(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    # ---- running -----------------------------------------------------------------------------

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT; sessions get DRAIN_S to end their answers."""
        self._worker.start()
        try:
            asyncio.run(self._main())
        finally:
            self._worker.stop()

    def start(self) -> None:
        """Runs on a thread of its own; returns when the port answers."""
        self._worker.start()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main()), name="edge-vlm-server", daemon=True
        )
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise ConfigError("the server did not start", where=self._authority)
            time.sleep(0.005)

    def stop(self, drain_s: float = 0.5) -> None:
        """Drains and ends the thread that `start` made."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_drain, drain_s)
        thread.join()
        self._worker.stop()

    def close(self) -> None:
        """Stops and frees everything; twice does no harm."""
        self.stop()
        self._socket.close()
        self._engines.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._uvicorn.serve(sockets=[self._socket])
        if self._drain_task is not None:
            await self._drain_task

    def _on_signal(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain, DRAIN_S)

    def _begin_drain(self, time_left_s: float) -> None:
        if self._drain_task is None and self._loop is not None:
            self._drain_task = self._loop.create_task(self._drain(time_left_s))

    async def _drain(self, time_left_s: float) -> None:
        await self._table.drain(time_left_s)
        while self._connections and time_left_s > 0:  # their close handshakes
            await asyncio.sleep(0.01)
            time_left_s -= 0.01
        self._uvicorn.should_exit = True

    # ---- what it answers ---------------------------------------------------------------------

    def _application(self) -> Starlette:
        application = Starlette(
            routes=[
                *[Route(path, _page(name, kind)) for path, (name, kind) in PAGE_FILES.items()],
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/version", self._version),
                Route("/metrics", self._metrics),
                WebSocketRoute(protocol.PATH, self._realtime),
            ]
        )
        application.add_middleware(_KeyGuard, key=self._api_key)
        return application

    async def _healthz(self, request: Request) -> Response:
        alive = self._worker.is_alive
        return JSONResponse({"alive": alive}, status_code=200 if alive else 503)

    async def _readyz(self, request: Request) -> Response:
        ready = self._worker.is_alive and not self._table.draining
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def _version(self, request: Request) -> Response:
        return JSONResponse(
            {
                "version": edge_vlm.__version__,
                "protocol_version": protocol.PROTOCOL_VERSION,
                "bundle": self._engines.bundle.name,
            }
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self._table.metrics.render(), media_type=CONTENT_TYPE)

    async def _realtime(self, websocket: WebSocket) -> None:
        if not _same_origin(websocket.headers.get("origin"), websocket.headers.get("host")):
            await websocket.close(1008, "a page from elsewhere may not connect")
            return
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            require_key(self._api_key, websocket.scope)
        except Unauthorized as error:
            await refuse(websocket, error)
            return
        if len(self._connections) >= CONNECTIONS_PER_SESSION * self.limits.max_sessions:
            await refuse(websocket, ServerBusy("too many connections", remedy="connect later"))
            return
        resumes = protocol.RESUME_PARAMETER in websocket.query_params
        connection = Connection(websocket, self._table, resumes=resumes)
        self._connections.add(connection)
        transport = self._transport_of(websocket)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            if transport is not None and self._loop is not None:
                # Closing waits for the other side to read what was sent; that may be never.
                self._loop.call_later(LINGER_S, transport.abort)

    def _transport_of(self, websocket: WebSocket) -> asyncio.Transport | None:
        """What carries this websocket; neither Starlette nor ASGI give it."""
        for carrier in self._uvicorn.server_state.connections:
            transport = getattr(carrier, "transport", None)
            if isinstance(transport, asyncio.Transport) and websocket.client is not None:
                peer = transport.get_extra_info("peername")
                if peer is not None and tuple(peer[:2]) == tuple(websocket.client):
                    return transport
        return None


class _KeyGuard:
    """ASGI middleware: HTTP 401 without the key. Websockets are told by an event, see above."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            try:
                require_key(self._key, scope)
            except Unauthorized as error:
                app = JSONResponse(
                    {
                        "error": {
                            "message": str(error),
                            "type": "invalid_request_error",
                            "param": None,
                            "code": error.code,
                        }
                    },
                    status_code=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await app(scope, receive, send)


class _Uvicorn(uvicorn.Server):
    """Lets us drain before it stops; a second signal stops it at once."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            self.should_exit = True
            self.force_exit = True
            return
        self._signalled = True
        self._on_signal()


def _listen(host: str, port: int) -> socket.socket:
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
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}", remedy="choose another --port"
        ) from error
    return listener


def _same_origin(origin: str | None, host: str | None) -> bool:
    """Browsers name the page's origin; a page from elsewhere must not reach a local server."""
    return origin is None or urlsplit(origin).netloc == host


def _page(name: str, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        content = (WEB / name).read_bytes()
        return Response(content, media_type=content_type, headers=PAGE_HEADERS)

    return page
