"""Whoever in the server's own process looks at its cameras, such as the way to Home Assistant.

Lives on the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from edge_vlm_runtime import protocol
from edge_vlm_runtime.cameras.camera import Camera
from edge_vlm_runtime.cameras.config import CameraPlan
from edge_vlm_runtime.cameras.reader import LIVE
from edge_vlm_runtime.server.client_session import ClientSession

log = logging.getLogger(__name__)


class StreamObserver(Protocol):
    """Every method returns at once."""

    def planned(self, plan: CameraPlan) -> None:
        """Which cameras and alerts there are from now on."""

    def began(self, camera: str) -> None:
        """It has a new session: nothing of the one before is left."""

    def noted(self, camera: str, *, is_live: bool) -> None:
        """Whether it gives pictures."""

    def said(self, camera: str, event: protocol.ServerEvent) -> None:
        """What its session says."""


class Observers:
    """All of one server. What one of them fails with is logged and harms nobody."""

    def __init__(self) -> None:
        self._observers: list[StreamObserver] = []
        self.on_plan: Callable[[CameraPlan], None] = lambda plan: None
        self._heard: dict[str, str] = {}
        """Session by camera."""

    def add(self, observer: StreamObserver) -> None:
        """Before the server runs."""
        self._observers.append(observer)

    def planned(self, plan: CameraPlan) -> None:
        self.on_plan(plan)
        self._tell(lambda observer: observer.planned(plan))

    def noted(self, camera: Camera, session: ClientSession | None) -> None:
        """A camera's state or session is another one."""
        name = camera.name
        if session is not None and self._heard.get(name) != session.session_id:
            self._heard[name] = session.session_id
            self._tell(lambda observer: observer.began(name))
            session.listeners.add(lambda event: self._said(name, event))
        self._tell(lambda observer: observer.noted(name, is_live=camera.state == LIVE))

    def _said(self, camera: str, event: protocol.ServerEvent | None) -> None:
        if event is not None:
            self._tell(lambda observer: observer.said(camera, event))

    def _tell(self, tell: Callable[[StreamObserver], None]) -> None:
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:  # the camera and its subscribers go on
                log.exception("an observer of the cameras failed")
