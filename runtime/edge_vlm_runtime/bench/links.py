"""Two ways to a session: the engine thread of this process, or the socket of a running server."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol, cast

from edge_vlm.errors import EdgeVlmError, InternalError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.client.sync import SyncClient
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.session.budget import default_settings
from edge_vlm_runtime.session.frames import EncodedFrame

OPEN_S = 120.0
"""That a session may take to open."""
Told = Callable[[int, protocol.ServerEvent], None]
"""Gets when an event came (nanoseconds, monotonic) and the event, on a thread of the link."""


class Link(Protocol):
    """One session. The calls are one thread's."""

    most_waiting: int
    """Pictures without an outcome that are allowed."""

    def send(self, jpeg: bytes, pts_us: int) -> None:
        """Hands a picture over; they are numbered from 1. Raises what ended the session."""

    def ask(self, text: str) -> None:
        """The answer comes as events."""

    def check(self) -> None:
        """Raises what ended the session."""

    def close(self) -> None: ...


class Engines:
    """The engine thread of this process."""

    path = "through the engine thread, without a socket"

    def __init__(self, engines: LoadedBundle) -> None:
        self._bundle, self._limits = engines.bundle, ServerLimits()
        self.worker = EngineWorker(engines, self._limits)
        self.worker.start()

    def open(self, settings: Settings, told: Told) -> Link:
        """Raises ConfigError, and what a session raises that cannot be opened."""
        own = default_settings(self._bundle, self._limits).changed(dict(settings))
        opened: queue.Queue[SessionHandle | EdgeVlmError] = queue.Queue()
        link = _EngineLink(self.worker, self._limits)

        def send(events: list[protocol.ServerEvent]) -> None:
            now_ns = time.monotonic_ns()
            for event in events:
                told(now_ns, event)

        self.worker.open_session(
            own,
            now_ns=time.monotonic_ns(),
            send=send,
            on_open=opened.put,
            on_failure=link.failed.set,
            limits=self._limits,
        )
        try:
            handle = opened.get(timeout=OPEN_S)
        except queue.Empty:
            raise InternalError(f"no session opened within {OPEN_S:.0f} s") from None
        if isinstance(handle, EdgeVlmError):
            raise handle
        link.handle = handle
        return link

    def close(self) -> None:
        self.worker.stop()


class _EngineLink:
    def __init__(self, worker: EngineWorker, limits: ServerLimits) -> None:
        self.handle: SessionHandle | None = None
        self.failed = threading.Event()
        self.most_waiting = limits.max_unacknowledged_frames
        self._worker, self._number = worker, 0

    def _open(self) -> SessionHandle:
        self.check()
        assert self.handle is not None
        return self.handle

    def send(self, jpeg: bytes, pts_us: int) -> None:
        self._number += 1
        frame = EncodedFrame(
            seq=self._number, capture_us=pts_us, received_ns=time.monotonic_ns(), data=jpeg
        )
        self._open().put_frame(frame)

    def ask(self, text: str) -> None:
        self._open().take(protocol.ResponseCreate(text=text))

    def check(self) -> None:
        if self.failed.is_set() or not self._worker.is_alive:
            raise InternalError("the session failed", remedy="see the log")

    def close(self) -> None:
        if self.handle is not None and self._worker.is_alive:
            closed = threading.Event()
            self._worker.close_session(self.handle, closed.set)
            closed.wait(OPEN_S)


class Served:
    """A running server, over its websocket."""

    path = "through the server's websocket"

    def __init__(self, url: str, access: Access | None = None) -> None:
        self._url, self._access = url, access

    def open(self, settings: Settings, told: Told) -> Link:
        """Raises ServerUnreachable and its leaves, ProtocolError, ConfigError."""
        return _SocketLink(
            SyncClient(
                self._url,
                cast("Settings", dict(settings)),
                access=self._access,
                reconnect=False,
                on_event=lambda event: told(time.monotonic_ns(), event),
            )
        )

    def created(self) -> protocol.SessionCreated:
        """What the server says of itself."""
        with SyncClient(self._url, access=self._access, reconnect=False) as client:
            assert isinstance(client.created, protocol.SessionCreated)
            return client.created

    def close(self) -> None:
        """There is nothing to close."""


class _SocketLink:
    def __init__(self, client: SyncClient) -> None:
        self._client = client
        self.most_waiting = client.created.limits.max_unacknowledged_frames

    def send(self, jpeg: bytes, pts_us: int) -> None:
        self._client.send_frame(jpeg, pts_us)

    def ask(self, text: str) -> None:
        self._client.start_answer(text)

    def check(self) -> None:
        self._client.raise_failure()

    def close(self) -> None:
        self._client.close()
