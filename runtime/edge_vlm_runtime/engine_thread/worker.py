"""The one thread that owns the engines and works for all sessions in turn."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_vlm.errors import EdgeVlmError, InternalError, ServerBusy
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.courtesy import Courtesy
from edge_vlm_runtime.engine_thread.handle import CallLog, SessionHandle
from edge_vlm_runtime.engine_thread.picture_thread import PictureThread
from edge_vlm_runtime.engine_thread.scheduler import Scheduler
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.session.session import Session

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.25


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
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False
        self._stopping = False
        self._ended = False
        self._courtesy = Courtesy()
        self._pictures = PictureThread(limits.max_evidence_bytes)
        self._closing: list[tuple[SessionHandle, Callable[[], None]]] = []
        """Sessions, and who is to be told."""
        self._is_pausing = False
        """Background work was left for later in this round."""
        self._scheduler: Scheduler[SessionHandle] = Scheduler(
            obey=SessionHandle.take_message,
            begins=lambda handle: handle.begins_answer,
            answer=self._answer,
            watch=self._watch,
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
        self._pictures.stop()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        with self._wake:
            self._woken = True
            self._wake.notify()

    def post(self, call: Callable[[], None]) -> None:
        """`call` is made on the engine thread, after those posted before it. Raises ServerBusy when
        that thread has ended."""
        with self._wake:
            if self._ended:
                raise ServerBusy("the server is stopping", remedy="connect again later")
            self._calls.append(call)
            self._wake.notify()

    def read_subtitles(self, text: str) -> None:
        """On the caller's thread, so that a session that gets them need not."""
        self._engines.prompt.subtitle_ids(text)

    def open_session(
        self,
        settings: SessionSettings,
        *,
        now_ns: int,
        send: Callable[[list[protocol.ServerEvent]], None],
        on_open: Callable[[SessionHandle | EdgeVlmError], None],
        on_failure: Callable[[], None],
        call_log: CallLog | None = None,
        limits: ServerLimits | None = None,
        is_background: bool = False,
        origin_us: int | None = None,
    ) -> None:
        """Makes a session that begins at `now_ns`, under other `limits` if given; `on_open` gets
        its handle or the error, on the engine thread. For the rest see `SessionHandle` and
        `Session`. Raises ServerBusy when the thread has ended."""

        def refuse(error: EdgeVlmError) -> None:
            if call_log is not None:
                call_log.close()
            on_open(error)

        def make() -> None:
            try:
                session = Session(
                    engines=self._engines,
                    settings=settings,
                    limits=limits or self._limits,
                    now_ns=now_ns,
                    stopwatch_ns=self.clock_ns,
                    origin_us=origin_us,
                )
                handle = SessionHandle(
                    session,
                    limits or self._limits,
                    clock_ns=self.clock_ns,
                    send=send,
                    wake=self.wake,
                    on_failure=on_failure,
                    call_log=call_log,
                    is_background=is_background,
                    pictures=self._pictures,
                )
                self._scheduler.add(handle)
            except EdgeVlmError as error:
                refuse(error)
                return
            except Exception:  # whatever it is, somebody waits for the outcome
                log.exception("a session could not be opened")
                remedy = "see the server's log"
                refuse(InternalError("the session could not be opened", remedy=remedy))
                return
            on_open(handle)

        try:
            self.post(make)
        except ServerBusy:
            if call_log is not None:
                call_log.close()
            raise

    def close_session(self, handle: SessionHandle, on_closed: Callable[[], None]) -> None:
        """Ends a session, when it has done what its messages ask for, in its turn; `on_closed` is
        called after its last event. Raises ServerBusy when the thread has ended, and the session
        with it."""
        self.post(lambda: self._closing.append((handle, on_closed)))

    # ---- the engine thread -------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._make_calls()
            self._close_those_done()
            handles = self._scheduler.sessions
            self._is_pausing = False
            worked = self._scheduler.round(interrupted=lambda: self._has_news)
            for handle in handles:
                handle.after_round()
                if handle.session is None:
                    self._scheduler.remove(handle)
            with self._wake:
                if not worked and not self._has_news and not self._stopping:
                    self._wake.wait(self._idle_s())
        while not self._ended:  # what was posted before the end is answered, too
            self._close_those_done()
            for handle in self._scheduler.sessions:
                self._scheduler.remove(handle)
                handle.close()
            self._make_calls()
            with self._wake:
                left = self._calls or self._closing or self._scheduler.sessions
                self._ended = not left

    def _close_those_done(self) -> None:
        closing, self._closing = self._closing, []
        for handle, on_closed in closing:
            if handle.num_waiting and handle.session is not None and not self._stopping:
                self._closing.append((handle, on_closed))
                continue
            self._scheduler.remove(handle)
            _make_call(handle.close)
            _make_call(on_closed)

    def _idle_s(self) -> float:
        """When there may be something to do without anybody waking the thread."""
        if not self._is_pausing:
            return IDLE_WAIT_S
        return min(self._courtesy.pause_ns(self.clock_ns()) * 1e-9, IDLE_WAIT_S)

    def _answer(self, handle: SessionHandle) -> bool:
        worked = handle.answer()
        if worked:
            self._courtesy.talked(self.clock_ns())
        return worked

    def _watch(self, handle: SessionHandle) -> bool:
        if not handle.is_background:
            return handle.watch()
        begin_ns = self.clock_ns()
        if self._courtesy.pause_ns(begin_ns):
            self._is_pausing = True
            return False
        worked = handle.watch()
        if worked:
            self._courtesy.worked(begin_ns, self.clock_ns())
        return worked

    @property
    def _has_news(self) -> bool:
        return self._woken or bool(self._calls)

    def _make_calls(self) -> None:
        with self._wake:
            calls, self._calls = self._calls, deque()
            self._woken = False
        for call in calls:
            _make_call(call)


def _make_call(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:  # one caller's bug must not end the thread that all wait for
        log.exception("a call on the engine thread failed")
