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
    TooManyRequests,
    Unauthorized,
)
from edge_vlm.errors.requests import ModelNotFound
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.openai.asgi import OpenAiApi, require_model
from edge_vlm_runtime.openai.envelope import envelope, headers_of, status_of
from edge_vlm_runtime.protocol.base import json_bytes
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.server.access.addresses import TrustedProxies, address_of
from edge_vlm_runtime.server.access.auth import SUBPROTOCOLS
from edge_vlm_runtime.server.access.doors import Doors, Stage, Visitor
from edge_vlm_runtime.server.access.hosts import require_host
from edge_vlm_runtime.server.access.keys import KeyCheck
from edge_vlm_runtime.server.access.origins import Origins, require_readable
from edge_vlm_runtime.server.asgi_server import OUT_OF_DESCRIPTORS, VISITOR
from edge_vlm_runtime.server.connection import Connection, refuse
from edge_vlm_runtime.server.live_api import MAX_BODY_BYTES, Answer, LiveApi
from edge_vlm_runtime.server.live_api import PREFIX as LIVE_PREFIX
from edge_vlm_runtime.server.metrics import CONTENT_TYPE
from edge_vlm_runtime.server.page import (
    DEMO_CLIP,
    FACTS_PATH,
    PAGE_HEADERS,
    STREET_PATH,
    WEB,
    page_facts,
    street_answer,
)
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
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
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
        proxies: TrustedProxies,
        doors: Doors,
        api_key: str | None,
        is_tls: bool,
        bound: tuple[str, int],
    ) -> None:
        """`bound`: address and port that are listened on."""
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
        self._proxies = proxies
        self._doors = doors
        self._keys = KeyCheck(api_key, on_attempt=table.metrics.key_refused)
        self._page = _Page(directory=WEB, html=True)
        self.connections: set[asyncio.Task[Any]] = set()
        """Of websockets."""

    def application(self) -> Starlette:
        application = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/health", self._healthz),
                Route("/readyz", self._readyz),
                Route("/version", self._version),
                Route("/metrics", self._metrics),
                WebSocketRoute(protocol.PATH, self._realtime),
                Route("/demo/clip.mp4", self._demo_clip),
                Route(STREET_PATH, self._demo_street, methods=METHODS),
                Route(FACTS_PATH, self._page_facts),
                Route(f"{LIVE_PREFIX}/{{path:path}}", self._live, methods=METHODS),
                Route(STREAMS_PREFIX, self._streams, methods=METHODS),
                Route(f"{STREAMS_PREFIX}/{{path:path}}", self._streams, methods=METHODS),
                Route("/v1", self._api),
                Route("/v1/{path:path}", self._api),
            ]
        )
        application.router.default = self._elsewhere
        application.add_middleware(
            _Guard,
            hosts=self._allowed_hosts,
            keys=self._keys,
            proxies=self._proxies,
            doors=self._doors,
        )
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

    async def _demo_street(self, request: Request) -> Response:
        return await self._answered(request, street_answer)

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
            await self._keys.require(websocket.scope)
            wanted = websocket.query_params.get("model")
            if wanted is not None:
                require_model(self._engines.bundle.name, wanted, "model")
        except (Unauthorized, TooManyRequests, ModelNotFound) as error:
            await refuse(websocket, error)
            return
        room = CONNECTIONS_PER_SESSION * self._limits.max_sessions + self._hub.max_connections
        visitor: Visitor = websocket.scope["state"][VISITOR]
        if len(self.connections) >= room and not self._doors.cut_stranger(visitor):
            await refuse(websocket, ServerBusy("too many connections", remedy="connect later"))
            return
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            await self._converse(websocket, visitor)
        finally:
            self.connections.discard(task)
            # Closing waits for the other side to read what was sent; that may be never.
            asyncio.get_running_loop().call_later(LINGER_S, visitor.cut)

    async def _converse(self, websocket: WebSocket, visitor: Visitor) -> None:
        query = websocket.query_params
        if protocol.STREAM_PARAMETER not in query:

            def served() -> None:
                visitor.stage = Stage.SERVED

            resumes = protocol.RESUME_PARAMETER in query
            await Connection(websocket, self._table, resumes=resumes, on_session=served).run()
            return
        visitor.stage = Stage.SERVED
        try:
            party = None if visitor.is_local else visitor.party
            await self._hub.subscribe(websocket, query, party)
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
    """ASGI middleware: 403 to a name that is not the server's and to an origin that cannot be read,
    401 to HTTP without the key, 429 to who guesses at it and to too many connections of a proxy's
    client. From here on `client` of the scope is who is asking.

    A websocket without the key is told so by an event, see above.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: frozenset[str],
        keys: KeyCheck,
        proxies: TrustedProxies,
        doors: Doors,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._keys = keys
        self._proxies = proxies
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        try:
            self._know(scope)
            require_host(self._hosts, scope)
            require_readable(scope)
            if scope["type"] == "http":
                await self._keys.require(scope)
        except (HostNotAllowed, Unauthorized, TooManyRequests) as error:
            app = _refusal(error)
        has_begun = False

        async def sent(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await app(scope, receive, sent)
        except OSError as error:
            if error.errno not in OUT_OF_DESCRIPTORS:
                raise
            log.error("a request failed: %s", error.strerror)
            if has_begun:
                scope["state"][VISITOR].cut()
                return
            busy = ServerBusy("no more files can be opened", remedy="try again later")
            await _refusal(busy)(scope, receive, send)

    def _know(self, scope: Scope) -> None:
        """Raises TooManyRequests."""
        peer = address_of(scope)
        if peer not in self._proxies:
            return
        client = self._proxies.client_of(peer, scope["headers"])
        scope["client"] = (client, 0)
        if not self._doors.know(scope["state"][VISITOR], client):
            raise TooManyRequests(
                "too many connections from this address", remedy="close some", retry_after_s=5
            )


def _refusal(error: EdgeVlmError) -> JSONResponse:
    return JSONResponse(envelope(error), status_of(error), headers_of(error))


def _with_first_part(send: Send) -> Send:
    """Sends the headers of a file when it could be opened: they come before that."""
    start: list[Message] = []

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.append(message)
            return
        while start:
            await send(start.pop())
        await send(message)

    return sent


class _Page(StaticFiles):
    """The browser page, which may load nothing from elsewhere."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # of an unknown path; older versions do not expect it
            await WebSocketClose()(scope, receive, send)
        else:
            await super().__call__(scope, receive, _with_first_part(send))

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response
