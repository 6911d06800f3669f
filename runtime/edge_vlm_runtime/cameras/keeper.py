"""All cameras of a server: started together, changed when their file changes.

Lives on the event loop, except what is checked before the server runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError, EdgeVlmError, UnknownStream
from edge_vlm.waiting import cancel
from edge_vlm_runtime.cameras.camera import Camera, CameraSetup, StreamSessions
from edge_vlm_runtime.cameras.config import CameraConfig, CameraPlan
from edge_vlm_runtime.protocol.alerts import AlertRule
from edge_vlm_runtime.protocol.settings import SessionSettings
from edge_vlm_runtime.recording.recorder import Recorder

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often the file is looked at; a change counts when it has stayed for so long."""


@dataclass(frozen=True, kw_only=True)
class CameraFile:
    """Where cameras come from."""

    plan: CameraPlan
    """As it was read before the start."""
    path: Path | None = None
    """Looked at again and again."""
    read: Callable[[], CameraPlan] | None = None
    """Reads it anew. Raises ConfigError."""
    hwaccel: str = "none"
    """What decodes, see `open_container`."""


class CameraKeeper:
    """Owns every camera from `start` to `stop`."""

    def __init__(
        self,
        file: CameraFile,
        *,
        setup: CameraSetup,
        sessions: StreamSessions,
        recorder_of: Callable[[Path], Recorder],
        check: Callable[[SessionSettings], object] = lambda settings: None,
        check_alerts: Callable[[Sequence[AlertRule]], object] = lambda rules: None,
    ) -> None:
        """`setup.recorder`: of all sessions; `recorder_of`: makes that of a folder; `check` raises
        ConfigError for settings that the model cannot hold to, `check_alerts` an EdgeVlmError for
        the last of some rules that no session would watch for. Raises ConfigError and
        RecordingError for the first plan."""
        self._file = file
        self._setup = setup
        self._sessions = sessions
        self._recorder_of = recorder_of
        self._check = check
        self._check_alerts = check_alerts
        self.plan = file.plan
        """In force."""
        self._setups = self._prepared(file.plan)
        self._cameras: dict[str, Camera] = {}
        self.on_state: Callable[[Camera], None] = lambda camera: None
        """A camera's state or session is another one."""
        self.on_gone: Callable[[str], None] = lambda name: None
        """There is no camera of this name any more."""
        self.on_plan: Callable[[CameraPlan], None] = lambda plan: None
        """A plan comes into force."""
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    @property
    def is_read_anew(self) -> bool:
        """There is a file that may change."""
        return self._file.read is not None

    @property
    def cameras(self) -> list[Camera]:
        """In the order of the file."""
        return [self._cameras[each.name] for each in self.plan.cameras if self._has(each.name)]

    def _has(self, name: str) -> bool:
        return name in self._cameras

    def camera(self, name: str) -> Camera:
        """Raises UnknownStream naming those there are."""
        found = self._cameras.get(name)
        if found is None:
            there = ", ".join(self._cameras) or "none"
            raise UnknownStream(f"there is no stream {name[:80]!r}", remedy=f"there are: {there}")
        return found

    def start(self) -> None:
        self.on_plan(self.plan)
        for config in self.plan.cameras:
            self._add(config)
        if self._file.path is not None and self._file.read is not None:
            self._spawn(self._follow_file(self._file.path))

    async def stop_reading(self) -> None:
        """No more pictures and no more changes; the sessions stay."""
        self._is_stopping = True
        await cancel(*self._tasks)
        for camera in self._cameras.values():
            await camera.stop_reading()

    async def stop(self, reason: str) -> None:
        """Ends all."""
        await self.stop_reading()
        await asyncio.gather(*(camera.stop(reason) for camera in self._cameras.values()))

    # ---- changes -----------------------------------------------------------------------------

    def reload_soon(self) -> None:
        """Reads the file anew, whether or not it seems changed; not while all is being stopped."""
        if not self._is_stopping:
            self._spawn(self.reload())

    async def reload(self) -> None:
        """What is wrong with the file is logged, and the plan in force stays in force."""
        if self._file.read is None:
            return
        async with self._reloading:
            try:
                plan = await asyncio.to_thread(self._file.read)
                setups = self._prepared(plan)
            except EdgeVlmError as error:
                log.error("the cameras stay as they are: %s", error)
                return
            await self._carry_out(plan, setups)

    async def _carry_out(self, plan: CameraPlan, setups: dict[str, CameraSetup]) -> None:
        before, self.plan, self._setups = self.plan, plan, setups
        self.on_plan(plan)
        old = {each.name: each for each in before.cameras}
        wanted = {each.name: each for each in plan.cameras}
        said: list[str] = []
        for name in [*old]:
            is_same = name in wanted and _is_same_stream(old[name], wanted[name])
            if not is_same and name in self._cameras:
                camera = self._cameras.pop(name)
                why = "another camera now" if name in wanted else "removed"
                said.append(f"{name} {why}")
                await camera.stop(f"the camera was {why}" if why == "removed" else f"it is {why}")
                if name not in wanted:
                    self.on_gone(name)
        for name, config in wanted.items():
            if name not in self._cameras:
                if name not in old:
                    said.append(f"{name} new")
                self._add(config)
                continue
            camera, alerts = self._cameras[name], plan.alerts_of(name)
            if config == camera.config and alerts == camera.alerts:
                continue
            said.append(f"{name} changed")
            try:
                await camera.apply(config, alerts)
            except EdgeVlmError as error:
                log.error("camera %s goes on as it was: %s", name, error)
        log.warning("cameras read anew: %s", ", ".join(said) or "nothing changed")

    def _add(self, config: CameraConfig) -> None:
        camera = Camera(
            config,
            self.plan.alerts_of(config.name),
            self._setups[config.name],
            self._sessions,
            lambda camera: self.on_state(camera),
        )
        self._cameras[config.name] = camera
        camera.start()

    def _prepared(self, plan: CameraPlan) -> dict[str, CameraSetup]:
        """Raises ConfigError, RecordingError."""
        setups = {}
        for config in plan.cameras:
            setup = replace(self._setup, recorder=self._recorder(config))
            try:
                self._check(setup.settings_of(config))
            except ConfigError as error:
                where = f"camera {config.name!r}"
                raise ConfigError(error.what, where=where, remedy=error.remedy) from error
            setups[config.name] = setup
            self._require_watchable(plan, config.name)
        return setups

    def _require_watchable(self, plan: CameraPlan, camera: str) -> None:
        """Raises ConfigError naming the first alert that would be refused."""
        rules: list[AlertRule] = []
        for alert in plan.alerts_of(camera):
            rules.append(alert.rule)
            try:
                self._check_alerts(rules)
            except EdgeVlmError as error:
                where = f"alert {alert.name!r} of camera {camera!r}"
                raise ConfigError(error.what, where=where, remedy=error.remedy) from error

    def _recorder(self, config: CameraConfig) -> Recorder | None:
        if isinstance(config.record, Path):
            return self._recorder_of(config.record)
        if config.record is False:
            return None
        if config.record is True and self._setup.recorder is None:
            raise ConfigError(
                "record = true needs a folder",
                where=f"camera {config.name!r}",
                remedy='record = "FOLDER" there, or for all sessions',
            )
        return self._setup.recorder

    async def _follow_file(self, path: Path) -> None:
        in_force = seen = await asyncio.to_thread(_signature, path)
        while True:
            await asyncio.sleep(POLL_S)
            before, seen = seen, await asyncio.to_thread(_signature, path)
            if seen == before and seen != in_force:
                in_force = seen
                await self.reload()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_same_stream(one: CameraConfig, other: CameraConfig) -> bool:
    """Else its memory would be of another place, or its recording in another file."""
    return one.source == other.source and one.record == other.record


def _signature(path: Path) -> tuple[int, ...] | None:
    """What is another one when the file has changed; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
