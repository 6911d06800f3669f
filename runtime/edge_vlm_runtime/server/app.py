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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_vlm.errors import (
    ConfigError,
    ServerBusy,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.waiting import cancel
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cameras.camera import CameraSetup
from edge_vlm_runtime.cameras.config import CameraPlan
from edge_vlm_runtime.cameras.keeper import CameraFile, CameraKeeper
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.openai.asgi import OpenAiApi
from edge_vlm_runtime.openai.media import MediaRules
from edge_vlm_runtime.openai.one_shot import OneShots
from edge_vlm_runtime.openai.request_queue import RequestQueue
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.recording.recorder import Recorder
from edge_vlm_runtime.server.access.hosts import allowed_hosts
from edge_vlm_runtime.server.access.origins import Origins
from edge_vlm_runtime.server.access.tls import Tls
from edge_vlm_runtime.server.asgi_server import AsgiServer, listen
from edge_vlm_runtime.server.live_api import LiveApi
from edge_vlm_runtime.server.memory_need import require_memory
from edge_vlm_runtime.server.sessions import OnEvent, SessionRegistry
from edge_vlm_runtime.server.site import Site
from edge_vlm_runtime.server.streams.hub import StreamHub
from edge_vlm_runtime.server.streams.observer import StreamObserver
from edge_vlm_runtime.session.budget import default_settings, notes_on, video_window

log = logging.getLogger(__name__)

DRAIN_S = 5.0


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
        accepted = Origins(origins)
        names = allowed_hosts(host, [*hosts, *accepted.hosts])
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
        self._is_tls = tls is not None
        self.host = host
        self.port = int(self._socket.getsockname()[1])
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
            allows_origin=accepted.allows,
            on_reply=self._table.metrics.replied,
        )
        live_api = LiveApi(self._table)
        self._hub = StreamHub(self._keeper, self._table, live_api, self.model)
        self._heeds_hangup = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self._announce: Callable[[], None] | None = None
        self._answers = threading.Event()
        """The port does, or never will."""
        self._site = Site(
            engines=engines,
            worker=self._worker,
            table=self._table,
            api=self._api,
            live_api=live_api,
            hub=self._hub,
            settings=self.settings,
            limits=self.limits,
            origins=accepted,
            hosts=names,
            api_key=api_key,
            is_tls=self._is_tls,
            bound=self._socket.getsockname()[:2],
            transport_of=lambda client: self._carrier.transport_of(client),
        )
        self._carrier = AsgiServer(
            self._site.application(),
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
        calibration: Path | None = None,
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
        """Checks and loads the bundle. `engines`: see `open_graphs`; `calibration`: see
        `bundle_model.calibrated`; `settings`: fields of
        SessionSettings in which new sessions differ from what the bundle was made for; `record_to`:
        a folder for a recording of each session, or the file for that of the only one; the rest:
        see `__init__`. Raises what `LoadedBundle.open` raises, ConfigError, RecordingError."""
        bounds = limits or ServerLimits()

        def check(found: EngineBundle) -> None:
            if not backend.is_on_gpu:  # the others hold weights on a device
                wanted = default_settings(found, bounds).changed(settings or {})
                num_cameras = 0 if cameras is None else len(cameras.plan.cameras)
                require_memory(found, wanted, bounds, num_cameras=num_cameras)

        opened = LoadedBundle.open(
            bundle, threads, backend, engines, check, calibration=calibration
        )
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
        if self._site.connections:  # their close handshakes
            await asyncio.wait(set(self._site.connections), timeout=time_left_s)
        self._carrier.should_exit = True
