"""The server's sessions: each outlives its connection for a while, so that a viewer may come back.

A session's events are numbered and kept in an `EventLog`. Whoever is connected reads from the log;
when the connection breaks, the engines go on with what they were asked, and the next connection of
that viewer reads on where the last one stopped. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import edge_vlm
from edge_vlm.errors import (
    EdgeVlmError,
    InternalError,
    ServerBusy,
    SessionGone,
    UnknownStream,
)
from edge_vlm.formats.usage import ModelCard
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.openai.live import Listening
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.recording.recorder import Recorder
from edge_vlm_runtime.server.client_session import ClientSession as ClientSession
from edge_vlm_runtime.server.client_session import OnEvent as OnEvent
from edge_vlm_runtime.server.client_session import Subscriber
from edge_vlm_runtime.server.metrics import ServerMetrics
from edge_vlm_runtime.session.budget import notes_on, video_room

log = logging.getLogger(__name__)


class SessionRegistry:
    """All sessions by name, connected or not. One for each server."""

    def __init__(
        self,
        *,
        worker: EngineWorker,
        bundle_name: str,
        settings: SessionSettings,
        model: ModelLimits,
        limits: ServerLimits,
        recorder: Recorder | None = None,
        on_event: OnEvent | None = None,
        card: ModelCard | None = None,
    ) -> None:
        """`on_event` gets a session's name and every event of it, connected or not."""
        self._on_event = on_event
        self.metrics = ServerMetrics(
            bundle_name=bundle_name, num_sessions=lambda: len(self._sessions)
        )
        self._worker = worker
        self._recorder = recorder
        self._bundle_name = bundle_name
        self._settings = settings
        self._model = model
        self._card = card
        self.limits = limits
        self.draining = False
        self._sessions: dict[str, ClientSession] = {}
        self._streams: dict[str, ClientSession] = {}
        """Sessions of the server's own cameras, by the camera's name."""
        self.on_stream_event: OnEvent = lambda camera, event: None
        """Gets a camera's name and every event of its session."""
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._openings: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.Task[None]] = set()

    @property
    def all_sessions(self) -> list[ClientSession]:
        """Those that can be asked."""
        return [session for session in self._sessions.values() if _is_live(session)]

    def live_session(self, name: str) -> ClientSession | None:
        """The one of that id, or of the server's camera of that name, if it can be asked."""
        session = self._sessions.get(name) or self._streams.get(name)
        return session if session is not None and _is_live(session) else None

    def require_session(self, name: str) -> ClientSession:
        """The same. Raises SessionGone, which names the cameras there are."""
        session = self.live_session(name)
        if session is not None:
            return session
        remedy = "start one, or ask another"
        if not self._streams:
            raise SessionGone("there is no such live session", remedy=remedy)
        raise UnknownStream(
            f"there is no live session or stream {name[:80]!r}",
            remedy=f"there are the streams {', '.join(self._streams)}",
        )

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def read_subtitles(self, text: str) -> None:
        """So that the engine thread finds them read. Blocks; not for the loop."""
        self._worker.read_subtitles(text)

    @property
    def clock_ns(self) -> Callable[[], int]:
        return self._worker.clock_ns

    # ---- a session's life --------------------------------------------------------------------

    async def open(self) -> ClientSession:
        """A new session whose log begins with `session.created`.

        A session whose viewer is away gives up its place when all are taken. Raises ServerBusy,
        ConfigError when the model cannot hold to the settings, RecordingError, InternalError for
        anything else; the place is free again then, also when the caller is cancelled.
        """
        given_up = self._make_room()
        session = ClientSession(self.limits, self._notify, self._bundle_name, self.clock_ns)
        return await self._opened(session, given_up, self._settings, self._recorder)

    async def open_stream(
        self, camera: str, settings: SessionSettings, recorder: Recorder | None
    ) -> ClientSession:
        """That of a camera of the server's own: it takes no viewer's place, and is not given up.
        Raises as `open`."""
        if self.draining:
            raise ServerBusy("the server is stopping", remedy="connect again later")
        session = ClientSession(self.limits, self._notify, self._bundle_name, self.clock_ns, camera)
        self._streams[camera] = session
        return await self._opened(session, None, settings, recorder)

    async def close_stream(self, session: ClientSession, reason: str) -> None:
        """Ends it; its subscribers are told why."""
        await self.end_engines_side(session)
        session.send(protocol.SessionClosed(reason=reason))
        session.end(1001, reason)
        await self.end(session)

    async def _opened(
        self,
        session: ClientSession,
        given_up: ClientSession | None,
        settings: SessionSettings,
        recorder: Recorder | None,
    ) -> ClientSession:
        self._sessions[session.session_id] = session  # before any await: the place is taken
        opening = asyncio.get_running_loop().create_task(
            self._open(session, given_up, settings, recorder)
        )
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:  # nobody is there any more to use it
            opening.add_done_callback(lambda opening: self._abandon(opening, session))
            raise
        return session

    def _abandon(self, opening: asyncio.Task[None], session: ClientSession) -> None:
        if opening.cancelled() or opening.exception() is None:
            self._end_soon(session)

    async def _open(
        self,
        session: ClientSession,
        given_up: ClientSession | None,
        settings: SessionSettings,
        recorder: Recorder | None,
    ) -> None:
        try:
            await self._begin(session, given_up, settings, recorder)
        except BaseException as error:
            await self.end(session)
            if isinstance(error, EdgeVlmError) or not isinstance(error, Exception):
                raise
            log.exception("a session could not be opened")
            raise InternalError(
                "the session could not be opened", remedy="see the server's log"
            ) from error

    async def _begin(
        self,
        session: ClientSession,
        given_up: ClientSession | None,
        settings: SessionSettings,
        recorder: Recorder | None,
    ) -> None:
        if given_up is not None:
            await self.end(given_up)
        session.handle = await self._open_engines_side(session, settings, recorder)
        if self.draining:  # it began to stop meanwhile
            raise ServerBusy("the server is stopping", remedy="connect again later")
        session.send(self.created(session, settings))

    def created(self, session: ClientSession, settings: SessionSettings) -> protocol.SessionCreated:
        """The first event of a session, or of a subscription to it."""
        return protocol.SessionCreated(
            session_id=session.session_id,
            resume_token="" if session.camera is not None else session.resume_token,
            protocol_version=protocol.PROTOCOL_VERSION,
            server=f"edge-vlm {edge_vlm.__version__}",
            model=self.model_part(),
            settings=settings,
            limits=self.limits,
            video=video_room(settings, self._model, self.limits),
            notes=notes_on(settings, self._model) or None,
        )

    async def _open_engines_side(
        self, session: ClientSession, settings: SessionSettings, recorder: Recorder | None
    ) -> SessionHandle:
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[SessionHandle | EdgeVlmError] = loop.create_future()
        now_ns = self.clock_ns()
        call_log = None
        if recorder is not None:
            call_log = recorder.record(session.session_id, settings, self.limits, now_ns)
        self._worker.open_session(
            settings,
            now_ns=now_ns,
            send=Deliveries(loop, session.send_all).put,
            on_open=lambda result: _on_loop(loop, resolve, opened, result),
            on_failure=lambda: _on_loop(loop, session.end, 1011, "the session failed"),
            call_log=call_log,
        )
        result = await opened
        if isinstance(result, EdgeVlmError):
            raise result
        return result

    def _make_room(self) -> ClientSession | None:
        """Finds a place for one more session; returns the session that lost its own for it."""
        if self.draining:
            raise ServerBusy("the server is stopping", remedy="connect again later")
        taken = sum(session.camera is None for session in self._sessions.values())
        if taken < self.limits.max_sessions:
            return None
        away = [session for session in self._sessions.values() if session.is_away]
        if not away and (silent := self._most_silent()) is not None:
            log.info("a session whose viewer shows and asks nothing makes room for a new one")
            reason = (
                f"nothing shown or asked for {silent.silent_s():.0f} s, and another viewer came"
            )
            silent.send(protocol.SessionClosed(reason=reason))
            silent.end(1013, reason)
            return self._sessions.pop(silent.session_id)
        if not away:
            raise ServerBusy(
                f"{taken} of {self.limits.max_sessions} sessions are taken, "
                "there is no waiting line",
                remedy="connect again later",
            )
        log.info("a session whose viewer is away makes room for a new one")
        longest = min(away, key=lambda session: session.left_at_s)
        return self._sessions.pop(longest.session_id)

    def _most_silent(self) -> ClientSession | None:
        """One that gives way, if there is any."""
        longest = max(self._sessions.values(), key=ClientSession.silent_s, default=None)
        if longest is None or longest.silent_s() <= self.limits.idle_session_s:
            return None
        return longest

    def listen(
        self, session_id: str, tell: Callable[[protocol.ServerEvent | None], None]
    ) -> Listening:
        """See `openai.live.LiveSessions`."""
        session = self.require_session(session_id)
        assert session.handle is not None  # it is live
        session.heard_ns = self.clock_ns()
        session.listeners.add(tell)
        return Listening(
            handle=session.handle,
            event_id=session.next_stranger_id(),
            stop=lambda: session.listeners.discard(tell),
        )

    def find(self, wanted: protocol.SessionResume) -> ClientSession:
        """The session to go on with. Raises SessionGone, ReplayLost, ProtocolError."""
        session = self._sessions.get(wanted.session_id)
        token = "" if session is None else session.resume_token
        same = hmac.compare_digest(token.encode(), wanted.resume_token.encode())
        delivered = (
            session is not None
            and session.ending is not None
            and wanted.last_sequence == session.log.newest
        )
        if session is None or not same or delivered:
            raise SessionGone(
                "there is no such session any more",
                remedy=f"start a new one; a broken connection's is kept for "
                f"{self.limits.resume_grace_s:g} s",
            )
        session.log.require(wanted.last_sequence)
        return session

    def resumed(self, session: ClientSession, last_sequence: int) -> protocol.SessionResumed:
        """The first message of a connection that goes on with a session."""
        settings = session.settings or self._settings
        return protocol.SessionResumed(
            session_id=session.session_id,
            messages_received=session.messages_received,
            newest_frame_sequence=session.newest_frame_sequence,
            events_to_come=session.log.newest - last_sequence,
            protocol_version=protocol.PROTOCOL_VERSION,
            server=f"edge-vlm {edge_vlm.__version__}",
            model=self.model_part(),
            settings=settings,
            limits=self.limits,
            video=video_room(settings, self._model, self.limits),
        )

    def attach(self, session: ClientSession, viewer: Subscriber) -> None:
        """From now on this connection reads; one that still did is displaced."""
        self._stop_expiry(session)
        session.heard_ns = self.clock_ns()
        previous, session.viewer = session.viewer, viewer
        if previous is not None:
            previous.displace()

    def leave(self, session: ClientSession) -> None:
        """The viewer's connection broke: the session is kept for `resume_grace_s`."""
        loop = asyncio.get_running_loop()
        session.viewer = None
        session.left_at_s = loop.time()
        if self.draining or self.limits.resume_grace_s == 0:
            self._end_soon(session)
            return
        self._expiries[session.session_id] = loop.call_later(
            self.limits.resume_grace_s, self._end_soon, session
        )

    async def end(self, session: ClientSession) -> None:
        """Ends a session for good. May be called more than once."""
        self._sessions.pop(session.session_id, None)
        if session.camera is not None and self._streams.get(session.camera) is session:
            del self._streams[session.camera]
        self._stop_expiry(session)
        await self.end_engines_side(session)
        session.end(1001, "the session has ended")
        if session.taking is not None:  # it waits for nothing any more
            await asyncio.wait({session.taking})
        self.metrics.ended(session.session_id)

    def _stop_expiry(self, session: ClientSession) -> None:
        expiry = self._expiries.pop(session.session_id, None)
        if expiry is not None:
            expiry.cancel()

    async def end_engines_side(self, session: ClientSession) -> None:
        """Frees the engines' side; what it still had to say stands in the log afterwards."""
        handle, session.handle = session.handle, None
        if handle is None:
            return
        session.progress.set()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        with suppress(ServerBusy):  # the engine thread has ended, and every session with it
            self._worker.close_session(handle, lambda: _on_loop(loop, resolve, ended, None))
            await ended

    def _end_soon(self, session: ClientSession) -> None:
        task = asyncio.get_running_loop().create_task(self.end(session))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def _notify(self, session_id: str, event: protocol.ServerEvent) -> None:
        self.metrics.event(session_id, event)
        session = self._sessions.get(session_id)
        if session is not None and session.camera is not None:
            self.on_stream_event(session.camera, event)
        if isinstance(event, protocol.SessionStats):
            self.metrics.complete(event)
        if self._on_event is not None:
            self._on_event(session_id, event)

    def model_part(self) -> protocol.Model:
        """What answers."""
        return protocol.Model(bundle=self._bundle_name, limits=self._model, card=self._card)

    # ---- the end of all ----------------------------------------------------------------------

    async def drain(self, time_left_s: float) -> None:
        """Lets the answers under way end, then closes every session with 1001. No new ones."""
        self.draining = True
        await asyncio.gather(*self._openings, return_exceptions=True)
        sessions = list(self._sessions.values())
        await asyncio.gather(*(self._drain(session, time_left_s) for session in sessions))
        await asyncio.gather(*self._ends)

    async def _drain(self, session: ClientSession, time_left_s: float) -> None:
        is_away = session.viewer is None and session.camera is None
        if is_away or session.handle is None:
            await self.end(session)
            return
        loop = asyncio.get_running_loop()
        session.send(protocol.SessionGoAway(time_left_s=time_left_s))
        idle: asyncio.Future[None] = loop.create_future()
        session.handle.when_idle(lambda: _on_loop(loop, resolve, idle, None))
        await asyncio.wait([idle], timeout=time_left_s)
        await self.end_engines_side(session)
        session.send(protocol.SessionClosed(reason="the server is stopping"))
        session.end(1001, "the server is stopping")


def _is_live(session: ClientSession) -> bool:
    return session.handle is not None and session.ending is None


def resolve(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


class Deliveries:
    """Events from the engine thread to the event loop, in order. The loop is woken once for all
    that come before it looks: a wake-up costs more than an event."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[protocol.ServerEvent]], None],
    ) -> None:
        self._loop, self._deliver = loop, deliver
        self._lock = threading.Lock()
        self._waiting: list[list[protocol.ServerEvent]] = []

    def put(self, events: list[protocol.ServerEvent]) -> None:
        """From any thread; returns at once."""
        with self._lock:
            self._waiting.append(events)
            if len(self._waiting) > 1:
                return
        _on_loop(self._loop, self._take)

    def _take(self) -> None:
        with self._lock:
            batches, self._waiting = self._waiting, []
        for events in batches:
            try:
                self._deliver(events)
            except Exception:  # the others of this wake-up come all the same
                log.exception("events could not be delivered")


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """For the engine thread, which never waits for a socket."""
    with suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
        loop.call_soon_threadsafe(call, *args)
