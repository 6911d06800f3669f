"""What the port of a server answers: the page, health, metrics, live streams, the websocket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import edge_vlm
from edge_vlm.errors import (
    EdgeVlmError,
    HostNotAllowed,
    MessageTooLarge,
    MissingExtraError,
    RequestTimeout,
    ServerBusy,
    Unauthorized,
)
from edge_vlm.request_errors import ModelNotFound
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.openai.asgi import OpenAiApi, require_model
from edge_vlm_runtime.openai.envelope import envelope, headers_of, status_of
from edge_vlm_runtime.protocol.base import json_bytes
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.server.access.auth import SUBPROTOCOLS, require_key
from edge_vlm_runtime.server.access.hosts import require_host
from edge_vlm_runtime.server.access.origins import Origins
from edge_vlm_runtime.server.connection import Connection, refuse
from edge_vlm_runtime.server.live_api import MAX_BODY_BYTES, Answer, LiveApi
from edge_vlm_runtime.server.live_api import PREFIX as LIVE_PREFIX
from edge_vlm_runtime.server.metrics import CONTENT_TYPE
from edge_vlm_runtime.server.page import DEMO_CLIP, FACTS_PATH, PAGE_HEADERS, WEB, page_facts
from edge_vlm_runtime.server.sessions import SessionRegistry
from edge_vlm_runtime.server.streams.hub import PREFIX as STREAMS_PREFIX
from edge_vlm_runtime.server.streams.hub import StreamHub
from edge_vlm_runtime.session.budget import notes_on

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketClose
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "starlette", "serve") from error

log = logging.getLogger(__name__)

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
"""Are told apart by what is asked."""
CONNECTIONS_PER_SESSION = 4
"""Connections that have no session yet, or none any more, count too."""
BODY_S = 30.0
"""For the body of a request about live streams."""
LINGER_S = 5.0
"""For the closing handshake of a websocket; then its connection is cut."""

Answers = Callable[[str, str, Mapping[str, str], bytes], Awaitable[Answer]]
"""Of method, path, query and body."""


class Site:
    """Of one server. Lives on its loop."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        worker: EngineWorker,
        table: SessionRegistry,
        api: OpenAiApi,
        live_api: LiveApi,
        hub: StreamHub,
        settings: SessionSettings,
        limits: ServerLimits,
        origins: Origins,
        hosts: frozenset[str],
        api_key: str | None,
        is_tls: bool,
        bound: tuple[str, int],
        transport_of: Callable[[Any], asyncio.Transport | None],
    ) -> None:
        """`bound`: address and port that are listened on; `transport_of`: that of a client's
        address."""
        self._engines = engines
        self._worker = worker
        self._table = table
        self._api = api
        self._live_api = live_api
        self._hub = hub
        self._settings = settings
        self._limits = limits
        self._origins = origins
        self._allowed_hosts = hosts
        self._api_key = api_key
        self._is_tls = is_tls
        self._bound = bound
        self._transport_of = transport_of
        self._page = _Page(directory=WEB, html=True)
        self.connections: set[asyncio.Task[Any]] = set()
        """Of websockets."""

    def application(self) -> Starlette:
        application = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/version", self._version),
                Route("/metrics", self._metrics),
                WebSocketRoute(protocol.PATH, self._realtime),
                Route("/demo/clip.mp4", self._demo_clip),
                Route(FACTS_PATH, self._page_facts),
                Route(f"{LIVE_PREFIX}/{{path:path}}", self._live, methods=METHODS),
                Route(STREAMS_PREFIX, self._streams, methods=METHODS),
                Route(f"{STREAMS_PREFIX}/{{path:path}}", self._streams, methods=METHODS),
                Route("/v1", self._api),
                Route("/v1/{path:path}", self._api),
            ]
        )
        application.router.default = self._elsewhere
        application.add_middleware(_Guard, hosts=self._allowed_hosts, key=self._api_key)
        return application

    async def _elsewhere(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A route matches no path with a line break in it.
        below = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._api if below else self._page)(scope, receive, send)

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
                "engines": self._engines.runs_on,
            }
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self._table.metrics.render(), media_type=CONTENT_TYPE)

    async def _demo_clip(self, request: Request) -> Response:
        return FileResponse(DEMO_CLIP, media_type="video/mp4", headers=PAGE_HEADERS)

    async def _page_facts(self, request: Request) -> Response:
        bound, port = self._bound
        body = {
            **await asyncio.to_thread(page_facts, bound, port, self._is_tls, self._api_key),
            "model": self._table.model_part(),
            "settings": self._settings,
            "limits": self._limits,
            "notes": notes_on(self._settings, ModelLimits.from_bundle(self._engines.bundle)),
        }
        return Response(json_bytes(body), media_type="application/json")

    async def _live(self, request: Request) -> Response:
        return await self._answered(request, self._live_api.answer)

    async def _streams(self, request: Request) -> Response:
        return await self._answered(request, self._hub.answer)

    async def _answered(self, request: Request, answers: Answers) -> Response:
        try:
            headers = request.headers
            if not self._origins.allows(headers.get("origin"), headers.get("host")):
                raise HostNotAllowed("a page from elsewhere may not look")
            body = await _small_body(request)
            path = request.path_params.get("path", "")
            answer = await answers(request.method, path, request.query_params, body)
        except EdgeVlmError as error:
            return JSONResponse(envelope(error), status_of(error), headers_of(error))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            log.exception("a request failed")
            return JSONResponse(envelope(error), status_of(error))
        return Response(answer.body, media_type=answer.kind, headers=dict(answer.headers))

    async def _realtime(self, websocket: WebSocket) -> None:
        headers = websocket.headers
        if not self._origins.allows(headers.get("origin"), headers.get("host")):
            await websocket.close(1008, "a page from elsewhere may not connect")
            return
        offered = websocket.scope.get("subprotocols", ())
        known = [name for name in SUBPROTOCOLS if name in offered]
        await websocket.accept(known[0] if known else None)
        try:
            require_key(self._api_key, websocket.scope)
            wanted = websocket.query_params.get("model")
            if wanted is not None:
                require_model(self._engines.bundle.name, wanted, "model")
        except (Unauthorized, ModelNotFound) as error:
            await refuse(websocket, error)
            return
        room = CONNECTIONS_PER_SESSION * self._limits.max_sessions + self._hub.max_connections
        if len(self.connections) >= room:
            await refuse(websocket, ServerBusy("too many connections", remedy="connect later"))
            return
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        transport = self._transport_of(websocket.client)
        try:
            await self._converse(websocket)
        finally:
            self.connections.discard(task)
            if transport is not None:
                # Closing waits for the other side to read what was sent; that may be never.
                asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    async def _converse(self, websocket: WebSocket) -> None:
        query = websocket.query_params
        if protocol.STREAM_PARAMETER not in query:
            resumes = protocol.RESUME_PARAMETER in query
            await Connection(websocket, self._table, resumes=resumes).run()
            return
        try:
            await self._hub.subscribe(websocket, query)
        except EdgeVlmError as error:
            await refuse(websocket, error)


async def _small_body(request: Request) -> bytes:
    """Raises MessageTooLarge, RequestTimeout."""

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise MessageTooLarge(f"more than {MAX_BODY_BYTES} bytes")
        return bytes(body)

    try:
        return await within(BODY_S, read())
    except asyncio.TimeoutError:
        raise RequestTimeout(f"no whole request in {BODY_S:g} s", remedy="send it faster") from None


class _Guard:
    """ASGI middleware: 403 to a name that is not the server's, 401 to HTTP without the key.

    A websocket without the key is told so by an event, see above.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], key: str | None) -> None:
        self._app = app
        self._hosts = hosts
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        try:
            require_host(self._hosts, scope)
            if scope["type"] == "http":
                require_key(self._key, scope)
        except (HostNotAllowed, Unauthorized) as error:
            app = JSONResponse(envelope(error), status_of(error), headers_of(error))
        await app(scope, receive, send)


class _Page(StaticFiles):
    """The browser page, which may load nothing from elsewhere."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # of an unknown path; older versions do not expect it
            await WebSocketClose()(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response
