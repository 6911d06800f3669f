"""One camera of the server: a reader that feeds a session which has no viewer of its own.

Lives on the event loop. The session is opened at once and stays for as long as the camera does,
whether or not pictures come; when a bug ends it, the next one begins. A film waits for the first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from edge_vlm.errors import ConfigError, EdgeVlmError, VideoUnreadable
from edge_vlm.waiting import cancel
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cameras.config import AlertConfig, CameraConfig
from edge_vlm_runtime.cameras.reader import LIVE, WAITING, CameraReader
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.settings import DropPolicy, SessionSettings
from edge_vlm_runtime.recording.recorder import Recorder
from edge_vlm_runtime.sources.open import is_live

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Before a session that ended is replaced."""
MAX_UNTAKEN = 4
"""Pictures that the event loop has not come to; of more the oldest are dropped, and counted."""

Reply = TypeVar("Reply", bound=protocol.ServerEvent)


class StreamSession(Protocol):
    """A session that is fed by the server itself."""

    session_id: str
    has_ended: asyncio.Event

    def feed(self, data: bytes, capture_us: int) -> None:
        """The next picture, a JPEG."""

    async def request(self, message: protocol.ClientMessage, kind: type[Reply]) -> Reply:
        """What the session answers. Raises what it is refused with."""


class StreamSessions(Protocol):
    """Where sessions come from."""

    async def open_stream(
        self, camera: str, settings: SessionSettings, recorder: Recorder | None
    ) -> StreamSession:
        """Raises as `SessionRegistry.open`."""

    async def close_stream(self, session: Any, reason: str) -> None:
        """Ends it; its subscribers are told why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CameraSetup:
    """What a camera works with besides its own table."""

    settings: SessionSettings
    """Of new sessions, where the camera's table says nothing else."""
    max_side: int
    hwaccel: str
    recorder: Recorder | None

    def settings_of(self, config: CameraConfig) -> SessionSettings:
        """Raises ConfigError, also for a street that is not rendered so fast."""
        from edge_vlm_runtime.sources.street import is_street, require_rate

        rate = {} if config.fps is None else {"fps_cap": config.fps}
        fixed = {"delivery": DropPolicy.LIVE, "raw_frames": False}
        settings = self.settings.changed({**config.settings, **rate, **fixed})
        try:
            if is_street(config.source):
                require_rate(config.source, settings.fps_cap)
        except VideoUnreadable as error:
            where = f"camera {config.name!r}"
            raise ConfigError(error.what, where=where, remedy=error.remedy) from error
        return settings


class Camera:
    """Runs from `start` to `stop`."""

    def __init__(
        self,
        config: CameraConfig,
        alerts: Sequence[AlertConfig],
        setup: CameraSetup,
        sessions: StreamSessions,
        on_state: Callable[[Camera], None] = lambda camera: None,
    ) -> None:
        """`on_state`: its state or its session is another one. Raises ConfigError."""
        self.config = config
        self.session: StreamSession | None = None
        self.state: str = WAITING
        self.detail: str | None = "not opened yet"
        self.untaken = 0
        """Pictures that were dropped before they reached the session."""
        self.times_back = 0
        """How often it gave pictures again after an absence."""
        self._alerts = {alert.name: alert for alert in alerts}
        self._alert_ids: dict[str, str] = {}
        self._setup = setup
        self._settings = setup.settings_of(config)
        self._sessions = sessions
        self._on_state = on_state
        self._lock = asyncio.Lock()
        """Whoever changes what the session is to do."""
        self._has_begun = False
        self._loop: asyncio.AbstractEventLoop
        self._reader: CameraReader | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def alerts(self) -> tuple[AlertConfig, ...]:
        """Those of the file."""
        return tuple(self._alerts.values())

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def alert_ids(self) -> Mapping[str, str]:
        """By name: those of the file that the session watches for."""
        return self._alert_ids

    @property
    def settings(self) -> SessionSettings:
        """Of its sessions."""
        return self._settings

    @property
    def is_recorded(self) -> bool:
        return self._setup.recorder is not None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running = self._loop.create_task(self._run())
        if is_live(self.config.source):
            self._read()

    async def stop_reading(self) -> None:
        """No more pictures and no other session; the present one stays."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        if self._running is not None:
            await cancel(self._running)

    async def stop(self, reason: str) -> None:
        """Ends the session, too; its subscribers are told why."""
        await self.stop_reading()
        session, self.session = self.session, None
        if session is not None:
            await self._sessions.close_stream(session, reason)

    # ---- pictures ----------------------------------------------------------------------------

    def _read(self) -> None:
        """A new reader, behind the one before."""
        before = self._reader
        if before is not None:
            before.close()
        self._reader = CameraReader(
            self.config.source,
            self._settings.fps_cap,
            _FromThread(self, self._loop),
            max_side=self._setup.max_side,
            hwaccel=self._setup.hwaccel,
            after_us=0 if before is None else before.newest_us,
        )
        self._reader.start()

    def put(self, jpeg: bytes, captured_us: int) -> None:
        """A picture came."""
        if self.session is None:
            self.untaken += 1
        else:
            self.session.feed(jpeg, captured_us)

    def note(self, state: str, detail: str | None) -> None:
        """The reader says how it goes."""
        if (state, detail) == (self.state, self.detail):
            return
        if state == WAITING:
            log.warning("camera %s is waited for: %s", self.name, detail)
        elif state == LIVE and self.state == WAITING and self._has_begun:
            self.times_back += 1
            log.warning("camera %s is back", self.name)
        self._has_begun = self._has_begun or state == LIVE
        self.state, self.detail = state, detail
        self._on_state(self)

    # ---- the session -------------------------------------------------------------------------

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                session = await self._sessions.open_stream(
                    self.name, self._settings, self._setup.recorder
                )
            except EdgeVlmError as error:
                log.error("camera %s has no session: %s", self.name, error)
            else:
                self.session = session
                self._alert_ids = {}
                self._on_state(self)
                if self._reader is None:  # a film, whose pictures nobody need miss
                    self._read()
                began_s = self._loop.time()
                async with self._lock:
                    for alert in self._alerts.values():
                        await self._create(alert)
                await session.has_ended.wait()
                self.session = None
                self._on_state(self)
                log.error("the session of camera %s has ended, a new one begins", self.name)
                if self._loop.time() - began_s > LONGEST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def apply(self, config: CameraConfig, alerts: Sequence[AlertConfig]) -> None:
        """Takes on another table, of the same source and recording, and other alerts; what did not
        change is not touched. Raises ConfigError for settings that do not go, before any change."""
        settings = self._setup.settings_of(config)
        async with self._lock:
            if settings != self._settings and self.session is not None:
                changes = _changes(self._settings, settings)
                patch = protocol.SettingsPatch(**changes)
                message = protocol.SessionUpdate(session=patch)
                await self.session.request(message, protocol.SessionUpdated)
            is_faster = settings.fps_cap != self._settings.fps_cap
            self.config, self._settings = config, settings
            if is_faster and self._reader is not None:
                self._read()
            wanted = {alert.name: alert for alert in alerts}
            before, self._alerts = self._alerts, wanted
            for name in before:
                if before[name].rule != getattr(wanted.get(name), "rule", None):
                    await self._delete(name)
            for name, alert in wanted.items():
                if name not in self._alert_ids:
                    await self._create(alert)

    async def _create(self, alert: AlertConfig) -> None:
        if self.session is None:
            return
        fields = dataclasses.asdict(alert.rule)
        message = messages.AlertCreate(**fields, name=alert.name)
        try:
            created = await self.session.request(message, messages.AlertCreated)
            self._alert_ids[alert.name] = created.alert.alert_id
        except EdgeVlmError as error:
            log.error("alert %s of camera %s is not watched: %s", alert.name, self.name, error)

    async def _delete(self, name: str) -> None:
        alert_id = self._alert_ids.pop(name, None)
        if alert_id is None or self.session is None:
            return
        message = messages.AlertDelete(alert_id=alert_id)
        with suppress(EdgeVlmError):  # it is gone already
            await self.session.request(message, messages.AlertDeleted)


class _FromThread:
    """Hands over what a reader says. Pictures are bounded: the newest are kept."""

    def __init__(self, camera: Camera, loop: asyncio.AbstractEventLoop) -> None:
        self._camera = camera
        self._loop = loop
        self._untaken: deque[tuple[bytes, int]] = deque()

    def picture(self, jpeg: bytes, captured_us: int) -> None:
        if len(self._untaken) >= MAX_UNTAKEN:
            with suppress(IndexError):  # taken just now
                self._untaken.popleft()
                self._camera.untaken += 1
        self._untaken.append((jpeg, captured_us))
        self._call(self._take)

    def state(self, state: str, detail: str | None) -> None:
        self._call(self._camera.note, state, detail)

    def _call(self, call: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(call, *args)

    def _take(self) -> None:
        with suppress(IndexError):  # dropped meanwhile
            self._camera.put(*self._untaken.popleft())


def _changes(before: SessionSettings, after: SessionSettings) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(SessionSettings)]
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in names}
    return {name: getattr(new, "value", new) for name, (old, new) in pairs.items() if old != new}
