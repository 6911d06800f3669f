"""The one thread that owns the engines and works for all sessions in turn.

The socket's side hands over frames (into its queue) and calls (a queue of closures that
run on this thread); what a session has to say goes out through the `emit` it was opened with, which
must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from edge_vlm.errors import EdgeVlmError, InternalError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.scheduler import Scheduler
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.recording.recorder import NoTape
from edge_vlm_runtime.session.frame_queue import Dropped, EncodedFrame
from edge_vlm_runtime.session.session import Session
from edge_vlm_runtime.session.video_feed import Emit, dropped_event

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle

log = logging.getLogger(__name__)

STATS_INTERVAL_NS = 1_000_000_000
IDLE_WAIT_S = 0.25


class SessionHandle:
    """The socket side's end of one session. Every method returns at once."""

    def __init__(
        self,
        worker: EngineWorker,
        session: Session,
        emit: Emit,
        on_failure: Callable[[], None],
        tape: NoTape,
    ) -> None:
        self._worker = worker
        self.emit = emit
        self.tape = tape
        self.on_failure = on_failure
        """Called when a bug ended the session; it emits nothing afterwards."""
        self.session: Session | None = session
        """Only the engine thread touches it, except for its slot; None once it has ended."""
        self.next_stats_ns = worker.clock_ns() + STATS_INTERVAL_NS
        self._slot = session.slot
        # Two counters, because each may be changed by one thread only.
        self._num_taken = 0
        self._num_done = 0

    @property
    def is_answering(self) -> bool:
        session = self.session
        return session is not None and session.is_answering

    def put_frame(self, frame: EncodedFrame) -> None:
        """Hands a frame over; its outcome comes as an event."""
        self._report(self._slot.put(frame))
        self._worker.wake()

    def refuse_frame(self, frame: EncodedFrame, error: EdgeVlmError) -> None:
        """Gives a frame whose message was broken its outcome."""
        self._report(self.tape.refuse(self._slot, frame, error), error)

    def _report(self, dropped: list[Dropped], error: EdgeVlmError | None = None) -> None:
        for frame, reason in dropped:
            self.emit(dropped_event(frame, reason, error))

    def take(self, message: protocol.ClientMessage) -> None:
        """Hands a message over; see Session.take. Its errors come as events."""
        received_ns = self._worker.clock_ns()
        self._num_taken += 1

        def run() -> None:
            self._num_done += 1
            session = self.session
            if session is not None:
                self.tape.work(
                    "message",
                    lambda: deliver(session, message, received_ns, self.emit),
                    message=message,
                    received_ns=received_ns,
                )

        self._worker.post(self, run)

    @property
    def num_waiting(self) -> int:
        """Messages handed over that the engine thread has not come to."""
        return self._num_taken - self._num_done


def deliver(
    session: Session, message: protocol.ClientMessage, received_ns: int, emit: Emit
) -> None:
    """What the session raises becomes an `error` event."""
    try:
        session.take(message, received_ns)
    except EdgeVlmError as error:
        emit(protocol.error_event(error, event_id=message.event_id))


class EngineWorker:
    """Runs until `stop`. Sessions are created, stepped and closed on its thread."""

    def __init__(
        self,
        engines: LoadedBundle,
        limits: ServerLimits,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engines = engines
        self._limits = limits
        self.clock_ns = clock_ns
        self._wake = threading.Condition()
        self._calls: deque[tuple[SessionHandle | None, Callable[[], None]]] = deque()
        self._woken = False
        self._stopping = False
        self._turns: Scheduler[SessionHandle] = Scheduler(
            answer=lambda handle: self._do(handle, "answer"),
            watch=lambda handle: self._do(handle, "watch"),
            clock_ns=clock_ns,
            max_answer_slowdown=limits.max_answer_slowdown,
        )
        self._thread = threading.Thread(target=self._run, name="edge-vlm-engines", daemon=True)

    # ---- called from other threads -----------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every session and the thread. Returns when it is done."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        with self._wake:
            self._woken = True
            self._wake.notify()

    def post(self, handle: SessionHandle | None, call: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append((handle, call))
            self._wake.notify()

    def open_session(
        self,
        settings: SessionSettings,
        emit: Emit,
        on_open: Callable[[SessionHandle | EdgeVlmError], None],
        on_failure: Callable[[], None],
        tape: NoTape | None = None,
    ) -> None:
        """Makes a session; `on_open` gets its handle or the error, on the engine thread. What it
        does goes on the tape, which is closed with it."""
        used = tape or NoTape()
        noted = used.emit(emit)

        def construct() -> Session:
            return Session(
                engines=self._engines,
                settings=settings,
                limits=self._limits,
                emit=noted,
                clock_ns=used.clock(self.clock_ns),
                make_slot=used.make_slot,
            )

        def make() -> None:
            try:
                session = used.work("open", construct)
            except EdgeVlmError as error:
                used.close()
                on_open(error)
                return
            handle = SessionHandle(self, session, noted, on_failure, used)
            self._turns.add(handle)
            on_open(handle)

        self.post(None, make)

    def close_session(self, handle: SessionHandle, on_closed: Callable[[], None]) -> None:
        """Ends a session; `on_closed` is called behind its last event."""

        def close() -> None:
            try:
                self._end(handle)
            finally:
                on_closed()

        self.post(None, close)

    # ---- the engine thread -------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._stopping:
                    break
                calls, self._calls = self._calls, deque()
                self._woken = False
            for handle, call in calls:
                self._guarded(handle, call)
            worked = self._turns.round(interrupted=lambda: bool(self._calls))
            for player in self._turns.players:
                self._guarded(player, partial(self._tell_stats, player))
            with self._wake:
                if not worked and not self._calls and not self._woken and not self._stopping:
                    self._wake.wait(IDLE_WAIT_S)
        for player in self._turns.players:
            self._guarded(player, partial(self._end, player))

    def _do(self, handle: SessionHandle, name: str) -> bool:
        """A unit of a session's work; False when it has none."""
        session = handle.session
        if session is None:
            return False
        unit = session.answer if name == "answer" else session.watch
        return bool(self._guarded(handle, lambda: handle.tape.work(name, unit)))

    def _tell_stats(self, handle: SessionHandle) -> None:
        session, now_ns = handle.session, self.clock_ns()
        if session is not None and now_ns >= handle.next_stats_ns:
            handle.next_stats_ns = now_ns + STATS_INTERVAL_NS
            handle.tape.work("stats", session.emit_stats)

    def _end(self, handle: SessionHandle) -> None:
        session, handle.session = handle.session, None
        self._turns.remove(handle)
        if session is not None:
            handle.tape.work("close", session.close)
            handle.tape.close()

    def _guarded(self, handle: SessionHandle | None, call: Callable[[], object]) -> object:
        """A bug in one session must not take the others down."""
        try:
            return call()
        except Exception:
            log.exception("a session failed")
            if handle is not None and handle in self._turns:
                self._turns.remove(handle)
                handle.session = None
                handle.emit(
                    protocol.error_event(
                        InternalError("the session failed", remedy="see the server's log")
                    )
                )
                handle.tape.close()
                handle.on_failure()
            return None
