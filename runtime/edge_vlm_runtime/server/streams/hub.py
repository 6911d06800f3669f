"""The server's cameras as the world sees them: `/v1/streams`, and who subscribes to which.

Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from edge_vlm.errors import ConfigError, EdgeVlmError, ServerBusy
from edge_vlm.errors.requests import MethodNotAllowed
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cameras.camera import Camera
from edge_vlm_runtime.cameras.keeper import CameraKeeper
from edge_vlm_runtime.cameras.reader import LIVE
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.base import json_bytes
from edge_vlm_runtime.protocol.settings import ModelLimits
from edge_vlm_runtime.server.client_session import ClientSession
from edge_vlm_runtime.server.live_api import Answer, LiveApi, newest_frame
from edge_vlm_runtime.server.metrics import LabelledFamily
from edge_vlm_runtime.server.sessions import SessionRegistry
from edge_vlm_runtime.server.streams.counts import CameraCounts
from edge_vlm_runtime.server.streams.observer import Observers
from edge_vlm_runtime.server.streams.requests import ask
from edge_vlm_runtime.server.streams.subscription import Subscription, WebSocket

log = logging.getLogger(__name__)

PREFIX = "/v1/streams"
OPENING_S = 10.0
"""Of a camera's session that is waited for."""
MAX_SUBSCRIBERS = 16
"""Of one camera."""
MAX_OF_PARTY = 12
"""Of these, from one address."""
MAX_CONNECTIONS = MAX_SUBSCRIBERS + 4
"""For one camera: one too many is still told why."""
ON, OFF = ("true", "1"), ("false", "0", "")


class StreamHub:
    """One for each server."""

    def __init__(
        self, keeper: CameraKeeper, table: SessionRegistry, live_api: LiveApi, model: ModelLimits
    ) -> None:
        self._keeper = keeper
        self._table = table
        self._live_api = live_api
        self._model = model
        self._subscribers: dict[str, set[Subscription]] = defaultdict(set)
        self._listings: dict[str, asyncio.Task[list[messages.AlertStatus] | None]] = {}
        """Under way, by session: whoever asks meanwhile gets the same."""
        self._counts = CameraCounts()
        self.observers = Observers()
        keeper.on_state = self._on_state
        self._changed = asyncio.Event()
        """A camera or its session is another one."""
        keeper.on_plan = self.observers.planned
        keeper.on_gone = self._counts.forget
        table.on_stream_event = self._counts.event
        table.metrics.others = self._families

    # ---- /metrics ----------------------------------------------------------------------------

    def _families(self) -> Iterator[LabelledFamily]:
        cameras = self._keeper.cameras
        yield from self._counts.families()
        now_ns = self._table.clock_ns()
        ages: dict[tuple[str, ...], float] = {}
        for camera in cameras:
            session = self._table.live_session(camera.name)
            if session is not None and session.view.newest is not None:
                ages[(camera.name,)] = (now_ns - session.view.newest.frame.received_ns) * 1e-9

        def each(value: Callable[[Camera], float]) -> dict[tuple[str, ...], float]:
            return {(camera.name,): float(value(camera)) for camera in cameras}

        for name, help, samples in (
            ("camera_up", "1 while a camera gives pictures.", each(lambda c: c.state == LIVE)),
            ("camera_newest_frame_age_seconds", "Since the newest accepted frame came.", ages),
            (
                "camera_returns_total",
                "How often a camera came back after an absence.",
                each(lambda c: c.times_back),
            ),
            (
                "camera_frames_untaken_total",
                "Pictures that never reached a session, because there was none or it was busy.",
                each(lambda c: c.untaken),
            ),
            (
                "camera_subscribers",
                "Connections that watch a camera.",
                each(lambda c: self.num_subscribers(c.name)),
            ),
        ):
            yield LabelledFamily(name=name, help=help, labels=("camera",), samples=samples)

    # ---- HTTP --------------------------------------------------------------------------------

    async def answer(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> Answer:
        """`path`: behind PREFIX. Raises UnknownStream, and as `LiveApi.answer`."""
        name, _, what = path.strip("/").partition("/")
        if not (name and what) and method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{method[:20]} is not for this path", remedy="use GET")
        if not name:
            found = await asyncio.gather(*map(self.about, self._keeper.cameras))
            return Answer(json_bytes({"object": "list", "data": found}))
        camera = self._keeper.camera(name)
        if not what:
            return Answer(json_bytes(await self.about(camera)))
        session_id = (await self._session(camera)).session_id
        return await self._live_api.answer(method, f"sessions/{session_id}/{what}", query, body)

    async def about(self, camera: Camera) -> dict[str, Any]:
        """As docs/cameras.md describes it."""
        session = self._table.live_session(camera.name)
        view = None if session is None else session.view
        stats = None if view is None else view.stats
        seen = 0 if view is None else view.cells_seen
        settings = None if session is None else session.settings
        return {
            "id": camera.name,
            "object": "edge_vlm.stream",
            "session": None if session is None else session.session_id,
            "state": camera.state,
            "detail": camera.detail,
            "source": camera.config.shown_source,
            "fps": None if stats is None else stats.fps_in,
            "keep_ratio": camera.settings.keep_ratio if settings is None else settings.keep_ratio,
            "cells": self._model.num_cells,
            "kept_ratio": view.cells_kept / seen if view is not None and seen else None,
            "frames_accepted": 0 if view is None else view.num_accepted,
            "newest_frame": None if view is None else newest_frame(view, self._table.clock_ns()),
            "newest_event": 0 if view is None else view.num_happened,
            "alerts": [] if session is None else await self._alerts(session),
            "recording": camera.is_recorded,
        }

    async def _alerts(self, session: ClientSession) -> list[messages.AlertStatus] | None:
        listing = self._listings.get(session.session_id)
        if listing is None:
            listing = asyncio.get_running_loop().create_task(_list(session))
            self._listings[session.session_id] = listing
            listing.add_done_callback(lambda _: self._listings.pop(session.session_id, None))
        return await asyncio.shield(listing)

    async def _session(self, camera: Camera) -> ClientSession:
        """Waits for one that is being opened, as at the server's start. Raises ServerBusy."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + OPENING_S
        while (session := self._table.live_session(camera.name)) is None:
            if self._table.draining or loop.time() >= until_s:
                raise ServerBusy(
                    f"the stream {camera.name!r} has no session just now", remedy="try again later"
                )
            self._changed.clear()
            with suppress(asyncio.TimeoutError):
                await within(until_s - loop.time(), self._changed.wait())
        return session

    # ---- subscribers -------------------------------------------------------------------------

    @property
    def max_connections(self) -> int:
        """Those that all its streams may have take nobody else's place."""
        return MAX_CONNECTIONS * len(self._keeper.cameras)

    def num_subscribers(self, name: str) -> int:
        return len(self._subscribers.get(name, ()))

    async def subscribe(
        self, websocket: WebSocket, query: Mapping[str, str], party: str | None = None
    ) -> None:
        """Serves an accepted connection to its end. `party`: whose it is, None for this machine's
        own. Raises, before anything is sent, UnknownStream, ConfigError, ServerBusy."""
        camera = self._keeper.camera(query[protocol.STREAM_PARAMETER])
        wanted = query.get(protocol.PICTURES_PARAMETER, "").lower()
        if wanted not in (*ON, *OFF):
            raise ConfigError(
                f"{protocol.PICTURES_PARAMETER} must be true or false, got {wanted[:40]!r}"
            )
        if protocol.RESUME_PARAMETER in query:
            raise ConfigError(
                "a subscription is not resumed", remedy="connect again without ?resume="
            )
        session = await self._session(camera)
        subscribers = self._subscribers[camera.name]
        if len(subscribers) >= MAX_SUBSCRIBERS:
            raise ServerBusy(
                f"{MAX_SUBSCRIBERS} subscribers watch {camera.name!r} already",
                remedy="connect again later",
            )
        if party is not None and sum(s.party == party for s in subscribers) >= MAX_OF_PARTY:
            raise ServerBusy(
                f"{MAX_OF_PARTY} subscribers of this address watch {camera.name!r} already",
                remedy="close one of them",
            )
        created = self._table.created(session, session.settings or camera.settings)
        created.stream = _stream(camera)
        subscription = Subscription(
            websocket,
            session,
            created,
            max_message_bytes=self._table.limits.max_message_bytes,
            with_pictures=wanted in ON,
            is_of_file=lambda alert_id: alert_id in camera.alert_ids.values(),
            is_draining=lambda: self._table.draining,
            on_lost_picture=lambda: self._counts.lost_picture(camera.name),
            party=party,
        )
        subscribers.add(subscription)
        try:
            await subscription.run()
        finally:
            subscribers.discard(subscription)

    async def ask(self, name: str, question: str) -> protocol.ResponseDone:
        """A question from inside the server. Raises UnknownStream, ServerBusy, and what the session
        refuses it with."""
        session = await self._session(self._keeper.camera(name))
        if session.handle is None:
            raise ServerBusy(f"the stream {name!r} is just ending", remedy="try again later")
        event_id = session.next_stranger_id()
        return await ask(session.handle, session.listeners, question, event_id)

    def _on_state(self, camera: Camera) -> None:
        self._changed.set()
        self.observers.noted(camera, self._table.live_session(camera.name))
        for subscriber in tuple(self._subscribers.get(camera.name, ())):
            subscriber.stream_changed(_stream(camera))


def _stream(camera: Camera) -> protocol.Stream:
    return protocol.Stream(name=camera.name, state=camera.state, detail=camera.detail)


async def _list(session: ClientSession) -> list[messages.AlertStatus] | None:
    """None when the session does not answer, because it ends or is too busy: not known."""
    try:
        return (await session.request(messages.AlertList(), messages.AlertListed)).alerts
    except EdgeVlmError as error:
        log.warning("the alerts of stream %s are not known now: %s", session.camera, error)
        return None
