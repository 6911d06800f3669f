"""The HTTP and websocket server around one engine worker.

`Server.open` loads and warms up the engines; `serve` runs on this thread until SIGTERM or Ctrl-C,
`start`/`stop` run it on a thread of its own (for commands that bring their own server, and tests).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import edge_vlm
from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    HostNotAllowed,
    MessageTooLarge,
    MissingExtraError,
    RequestTimeout,
    ServerBusy,
    Unauthorized,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.request_errors import ModelNotFound
from edge_vlm.waiting import cancel, within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cameras.camera import CameraSetup
from edge_vlm_runtime.cameras.config import CameraPlan
from edge_vlm_runtime.cameras.keeper import CameraFile, CameraKeeper
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.openai.asgi import OpenAiApi, require_model
from edge_vlm_runtime.openai.envelope import envelope, headers_of, status_of
from edge_vlm_runtime.openai.media import MediaRules
from edge_vlm_runtime.openai.one_shot import OneShots
from edge_vlm_runtime.openai.request_queue import RequestQueue
from edge_vlm_runtime.protocol.base import json_bytes
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.recording.recorder import Recorder
from edge_vlm_runtime.server.access.auth import SUBPROTOCOLS, require_key
from edge_vlm_runtime.server.access.hosts import allowed_hosts, require_host
from edge_vlm_runtime.server.access.origins import Origins
from edge_vlm_runtime.server.access.tls import Tls
from edge_vlm_runtime.server.asgi_server import AsgiServer, listen
from edge_vlm_runtime.server.connection import Connection, refuse
from edge_vlm_runtime.server.live_api import MAX_BODY_BYTES, Answer, LiveApi
from edge_vlm_runtime.server.live_api import PREFIX as LIVE_PREFIX
from edge_vlm_runtime.server.memory_need import require_memory
from edge_vlm_runtime.server.metrics import CONTENT_TYPE
from edge_vlm_runtime.server.page import DEMO_CLIP, FACTS_PATH, PAGE_HEADERS, WEB, page_facts
from edge_vlm_runtime.server.sessions import OnEvent, SessionRegistry
from edge_vlm_runtime.server.streams.hub import PREFIX as STREAMS_PREFIX
from edge_vlm_runtime.server.streams.hub import StreamHub
from edge_vlm_runtime.server.streams.observer import StreamObserver
from edge_vlm_runtime.session.budget import default_settings, notes_on, video_window

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
DRAIN_S = 5.0
CONNECTIONS_PER_SESSION = 4
"""Connections that have no session yet, or none any more, count too."""
BODY_S = 30.0
"""For the body of a request about live streams."""
LINGER_S = 5.0
"""For the closing handshake of a websocket; then its connection is cut."""


Answers = Callable[[str, str, Mapping[str, str], bytes], Awaitable[Answer]]
"""Of method, path, query and body."""


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
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        media: MediaRules | None = None,
        cameras: CameraFile | None = None,
        recorder_of: Callable[[Path], Recorder] | None = None,
    ) -> None:
        """Port 0 takes a free one; `on_event` gets a session's name and every event of it, on the
        server's loop; with `api_key` a client must have it, see `auth`; `hosts`: names the server
        answers to besides its own, see `allowed_hosts`; `origins`: of pages that may connect
        besides its own; `media`: what HTTP requests may name besides data URIs; `cameras`: those
        that it owns; `recorder_of`: makes that of a folder. Raises ConfigError when host and port
        cannot be listened on, or the settings do not fit the model."""
        self.limits = limits or ServerLimits()
        self.settings = settings or default_settings(engines.bundle, self.limits)
        self.model = ModelLimits.from_bundle(engines.bundle)
        video_window(self.settings, self.model, self.limits)  # raises if it cannot be held to
        self._origins = Origins(origins)
        self._allowed_hosts = allowed_hosts(host, [*hosts, *self._origins.hosts])
        self._engines = engines
        self._recorder = recorder
        self._worker = EngineWorker(engines, self.limits)
        self._recorders: dict[Path, Recorder] = {}
        self._table = SessionRegistry(
            worker=self._worker,
            bundle_name=engines.bundle.name,
            settings=self.settings,
            model=self.model,
            limits=self.limits,
            recorder=recorder,
            on_event=on_event,
            card=engines.bundle.card,
        )
        self._keeper = self._make_keeper(cameras or CameraFile(plan=CameraPlan()), recorder_of)
        self._socket = listen(host, port)
        self._api_key = api_key
        self._is_tls = tls is not None
        self.host = host
        self.port = int(self._socket.getsockname()[1])
        self._connections: set[asyncio.Task[Any]] = set()
        rules = media or MediaRules()
        self._queue = RequestQueue(self.limits)
        self._api = OpenAiApi(
            one_shots=OneShots(
                engines=engines,
                worker=self._worker,
                limits=self.limits,
                settings=self.settings,
                rules=dataclasses.replace(rules, max_bytes=self.limits.max_request_bytes),
                on_event=self._table.metrics.one_shot_event,
            ),
            live=self._table,
            queue=self._queue,
            model_id=engines.bundle.name,
            allows_origin=self._origins.allows,
            on_reply=self._table.metrics.replied,
        )
        self._live_api = LiveApi(self._table)
        self._hub = StreamHub(self._keeper, self._table, self._live_api, self.model)
        self._heeds_hangup = False
        self._page = _Page(directory=WEB, html=True)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self._announce: Callable[[], None] | None = None
        self._answers = threading.Event()
        """The port does, or never will."""
        self._carrier = AsgiServer(
            self._application(),
            self.limits,
            tls,
            on_start=self._on_start,
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
        settings: Mapping[str, Any] | None = None,
        record_to: Path | None = None,
        on_event: OnEvent | None = None,
        api_key: str | None = None,
        tls: Tls | None = None,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        media: MediaRules | None = None,
        cameras: CameraFile | None = None,
    ) -> Server:
        """Checks and loads the bundle. `engines`: see `open_graphs`; `settings`: fields of
        SessionSettings in which new sessions differ from what the bundle was made for; `record_to`:
        a folder for a recording of each session, or the file for that of the only one; the rest:
        see `__init__`. Raises what `LoadedBundle.open` raises, ConfigError, RecordingError."""
        bounds = limits or ServerLimits()

        def check(found: EngineBundle) -> None:
            if not backend.is_on_gpu:  # the others hold weights on a device
                wanted = default_settings(found, bounds).changed(settings or {})
                num_cameras = 0 if cameras is None else len(cameras.plan.cameras)
                require_memory(found, wanted, bounds, num_cameras=num_cameras)

        opened = LoadedBundle.open(bundle, threads, backend, engines, check)
        try:
            warm_up(opened)
            recorder_of = functools.partial(Recorder, bundle=opened.bundle, threads=threads)
            recorder = None if record_to is None else recorder_of(path=record_to)
            return cls(
                opened,
                host=host,
                port=port,
                limits=bounds,
                settings=default_settings(opened.bundle, bounds).changed(settings or {}),
                recorder=recorder,
                on_event=on_event,
                api_key=api_key,
                tls=tls,
                hosts=hosts,
                origins=origins,
                media=media,
                cameras=cameras,
                recorder_of=lambda folder: recorder_of(path=folder),
            )
        except BaseException:
            opened.close()
            raise

    def _make_keeper(
        self, file: CameraFile, recorder_of: Callable[[Path], Recorder] | None
    ) -> CameraKeeper:
        """Raises ConfigError, RecordingError."""

        def recorder(folder: Path) -> Recorder:
            if folder not in self._recorders:
                if recorder_of is None:
                    raise ConfigError("this server does not record", where=folder)
                self._recorders[folder] = recorder_of(folder)
            return self._recorders[folder]

        return CameraKeeper(
            file,
            setup=CameraSetup(
                settings=self.settings,
                max_side=self.model.useful_side,
                hwaccel=file.hwaccel,
                recorder=self._recorder,
            ),
            sessions=self._table,
            recorder_of=recorder,
            check=lambda settings: video_window(settings, self.model, self.limits),
        )

    def observe_streams(self, observer: StreamObserver) -> None:
        """Tells it of the server's cameras, on the server's loop. Before the server runs."""
        self._hub.observers.add(observer)

    def on_plan(self, call: Callable[[CameraPlan], None]) -> None:
        """Called on the server's loop with each plan of cameras that comes into force."""
        self._hub.observers.on_plan = call

    def ask_stream(self, name: str, question: str) -> Future[protocol.ResponseDone]:
        """Asks a camera of the server, from any thread. The future raises UnknownStream,
        ServerBusy, and what the session refuses it with."""
        if self._loop is None:
            raise ServerBusy("the server does not run yet", remedy="ask again later")
        return asyncio.run_coroutine_threadsafe(self._hub.ask(name, question), self._loop)

    @property
    def has_cameras(self) -> bool:
        """Of its own."""
        return bool(self._keeper.plan.cameras)

    @property
    def bundle_name(self) -> str:
        return self._engines.bundle.name

    @property
    def camera_plan(self) -> CameraPlan:
        """Of the cameras that it owns, as it is in force."""
        return self._keeper.plan

    @property
    def notes(self) -> list[str]:
        """What is to be known of the settings of new sessions."""
        return notes_on(self.settings, self.model)

    @property
    def runs_on(self) -> str:
        """Which libraries run the graphs, in words."""
        return self._engines.runs_on

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"{'wss' if self._is_tls else 'ws'}://{self._authority}{protocol.PATH}"

    @property
    def page_url(self) -> str:
        return f"{'https' if self._is_tls else 'http'}://{self._authority}/"

    @property
    def num_waiting_requests(self) -> int:
        """HTTP requests that wait for their turn."""
        return self._queue.num_waiting

    @property
    def _authority(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    # ---- running -----------------------------------------------------------------------------

    def serve(self, on_start: Callable[[], None] | None = None) -> None:
        """Runs until SIGTERM or SIGINT; sessions get DRAIN_S to end their answers. `on_start` is
        called when the port answers and a signal is heeded."""
        self._announce = on_start
        self._heeds_hangup = self._keeper.is_read_anew and hasattr(signal, "SIGHUP")
        self._worker.start()
        try:
            asyncio.run(self._main())
        finally:
            self._stop_worker()

    def start(self) -> None:
        """Runs on a thread of its own; returns when the port answers."""
        self._worker.start()
        self._thread = threading.Thread(
            target=self._run_thread, name="edge-vlm-server", daemon=True
        )
        self._thread.start()
        self._answers.wait()
        if not self._carrier.started:
            raise ConfigError("the server did not start", where=self._authority)

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception:
            log.exception("the server ended")
        finally:
            self._answers.set()

    def stop(self, drain_s: float = 0.5) -> None:
        """Drains and ends the thread that `start` made."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_drain, drain_s)
        thread.join()
        self._stop_worker()

    def _stop_worker(self) -> None:
        self._worker.stop()
        recorders = [self._recorder, *self._recorders.values()]
        for recorder in recorders:
            if recorder is not None:
                recorder.close()

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
        gauges = self._loop.create_task(self._table.metrics.follow_machine())
        if self._heeds_hangup:
            self._loop.add_signal_handler(signal.SIGHUP, self._keeper.reload_soon)
        self._keeper.start()
        try:
            await self._carrier.serve(sockets=[self._socket])
            if self._drain_task is not None:
                await self._drain_task
        finally:
            await self._keeper.stop("the server is stopping")
            await cancel(gauges)

    def _on_start(self) -> None:
        self._answers.set()
        if self._announce is not None:
            self._announce()

    def _on_signal(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain, DRAIN_S)

    def _begin_drain(self, time_left_s: float) -> None:
        if self._drain_task is None and self._loop is not None:
            self._drain_task = self._loop.create_task(self._drain(time_left_s))

    async def _drain(self, time_left_s: float) -> None:
        await self._keeper.stop_reading()
        await asyncio.gather(self._table.drain(time_left_s), self._api.drain(time_left_s))
        if self._connections:  # their close handshakes
            await asyncio.wait(set(self._connections), timeout=time_left_s)
        self._carrier.should_exit = True

    # ---- what it answers ---------------------------------------------------------------------

    def _application(self) -> Starlette:
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
                "engines": self.runs_on,
            }
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self._table.metrics.render(), media_type=CONTENT_TYPE)

    async def _demo_clip(self, request: Request) -> Response:
        return FileResponse(DEMO_CLIP, media_type="video/mp4", headers=PAGE_HEADERS)

    async def _page_facts(self, request: Request) -> Response:
        bound = self._socket.getsockname()[0]
        body = {
            **await asyncio.to_thread(page_facts, bound, self.port, self._is_tls, self._api_key),
            "model": self._table.model_part(),
            "settings": self.settings,
            "limits": self.limits,
            "notes": self.notes,
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
        room = self.limits.max_sessions + self._hub.num_streams
        if len(self._connections) >= CONNECTIONS_PER_SESSION * room:
            await refuse(websocket, ServerBusy("too many connections", remedy="connect later"))
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        transport = self._carrier.transport_of(websocket.client)
        try:
            await self._converse(websocket)
        finally:
            self._connections.discard(task)
            if transport is not None and self._loop is not None:
                # Closing waits for the other side to read what was sent; that may be never.
                self._loop.call_later(LINGER_S, transport.abort)

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
