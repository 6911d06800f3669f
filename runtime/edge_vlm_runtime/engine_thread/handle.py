"""A session as its two sides share it: the socket's side puts in, the engine thread works.

Frames go through a `FrameQueue`, messages through an inbox; events leave in one batch after each
unit of work. Whatever is asked of the session is a `Call`, so a log of them is a recording.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_vlm.errors import EdgeVlmError, InternalError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.frame_queue import FrameQueue
from edge_vlm_runtime.engine_thread.picture_thread import PictureThread
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.session.calls import (
    Call,
    Called,
    CloseCall,
    FrameCall,
    MessageCall,
    StatsCall,
    StepCall,
    perform,
)
from edge_vlm_runtime.session.frames import DroppedFrame, EncodedFrame
from edge_vlm_runtime.session.session import Session, Turn

log = logging.getLogger(__name__)

STATS_INTERVAL_NS = 1_000_000_000


class CallLog(Protocol):
    """Where a session's calls are noted. Neither method may wait for a disk."""

    def write(self, entry: Called | DroppedFrame) -> None: ...

    def close(self) -> None:
        """Nothing more will come."""


class SessionHandle:
    """One session and its frame queue."""

    def __init__(
        self,
        session: Session,
        limits: ServerLimits,
        *,
        clock_ns: Callable[[], int],
        send: Callable[[list[protocol.ServerEvent]], None],
        wake: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
        call_log: CallLog | None = None,
        is_background: bool = False,
        pictures: PictureThread | None = None,
    ) -> None:
        """`is_background`: nobody watches it live, so even its answers give way to those of others.
        `pictures`: decodes what takes long; without it that is done here.
        `send` gets the events of each unit of work, from either side, and none after a message
        that has nothing to say yet; it must not block. `wake`: there is something to do.
        `on_failure`: a bug ended the session, nothing is sent any more."""
        self._session: Session | None = session
        self._clock_ns = clock_ns
        self._send = send
        self._wake = wake
        self._on_failure = on_failure
        self._call_log = call_log
        self.is_background = is_background
        self._pictures = pictures
        self._decoding: EncodedFrame | None = None
        """A frame out of the queue that is being decoded; the next one waits for it."""
        self._decoded: EncodedFrame | None = None
        """The same when that is done."""
        self._wanted: EncodedFrame | None = None
        """A picture that is being decoded once more, for a question."""
        self._found: EncodedFrame | None = None
        """The same when that is done."""
        self._on_idle: Callable[[], None] | None = None
        self._inbox: deque[tuple[protocol.ClientMessage, int, float]] = deque()
        self._queue = FrameQueue(
            delivery=session.settings.delivery,
            fps_cap=session.settings.fps_cap,
            wait_capacity=limits.max_unacknowledged_frames,
        )
        self._capture_us: tuple[int, int] | None = None
        """Of the first frame and of the newest one that came."""
        self._next_stats_ns = clock_ns() + STATS_INTERVAL_NS

    # ---- the socket's side: every method returns at once -------------------------------------

    def put_frame(self, frame: EncodedFrame) -> None:
        """Hands a frame over; its outcome comes as an event, unless a bug has ended the session."""
        if self._session is None:
            return
        self._note_arrival(frame)
        self._drop(self._queue.put(frame))
        self._wake()

    def refuse_frame(self, frame: EncodedFrame, error: EdgeVlmError) -> None:
        """Gives a frame whose message was broken its outcome."""
        if self._session is None:
            return
        self._note_arrival(frame)
        self._drop(self._queue.refuse(frame, error))

    def take(self, message: protocol.ClientMessage) -> None:
        """Hands a message over; its errors come as events."""
        first_us, newest_us = self._capture_us or (0, 0)
        self._inbox.append((message, self._clock_ns(), (newest_us - first_us) * 1e-6))
        self._wake()

    @property
    def num_waiting(self) -> int:
        """Messages handed over that the engine thread has not come to."""
        return len(self._inbox)

    @property
    def frames_waiting(self) -> int:
        return len(self._queue) + (self._decoding is not None)

    @property
    def is_answering(self) -> bool:
        """Whether a question waits or is answered, as far as the engine thread has got."""
        session = self._session
        return session is not None and session.is_answering

    @property
    def has_room(self) -> bool:
        """Whether one more picture that is never dropped may be put."""
        return self._queue.has_room

    def when_idle(self, call: Callable[[], None]) -> None:
        """`call` is made, by either side, once nothing waits to be answered or the session has
        ended; it must bear being made twice."""
        self._on_idle = call
        if self._session is None:
            call()
        else:
            self._wake()

    def _note_arrival(self, frame: EncodedFrame) -> None:
        first_us, _ = self._capture_us or (frame.capture_us, 0)
        self._capture_us = (first_us, frame.capture_us)

    def _drop(self, dropped: Sequence[DroppedFrame]) -> None:
        if self._call_log is not None:
            for each in dropped:
                self._call_log.write(each)
        if dropped:
            self._send([each.event() for each in dropped])

    # ---- the engine thread -------------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """None once it has ended."""
        return self._session

    def take_messages(self) -> None:
        """Does what all messages so far ask for."""
        while self.take_message():
            pass

    def take_message(self) -> bool:
        """Does what one message asks for; False when there is none."""
        if not self._inbox or self._session is None:
            return False
        message, received_ns, video_s = self._inbox.popleft()
        self._call(
            MessageCall(
                message=message,
                received_ns=received_ns,
                video_s=video_s,
                frames_waiting=self.frames_waiting,
            )
        )
        return True

    @property
    def begins_answer(self) -> bool:
        """The next unit of an answer is the first of one."""
        return self._session is not None and not self._session.is_decoding

    def answer(self) -> bool:
        """A token of the answer under way, or the next question; False when nobody waits."""
        return not self.is_background and self._answer()

    def _answer(self) -> bool:
        if self._awaits_picture():
            return False
        return self._call(StepCall(turn=Turn.ANSWER, frames_waiting=self.frames_waiting))

    def _awaits_picture(self) -> bool:
        """The next question does, which would take long to decode here."""
        if self._pictures is None or self._session is None:
            return False
        if self._wanted is None:
            found = None
        elif self._found is None:
            return True
        else:
            found, self._found, self._wanted = self._found, None, None
        wanted = self._session.picture_wanted
        if wanted is None:
            return False
        if found is not None and found.data is wanted.data:
            self._session.provide(found)
            return False
        self._wanted = wanted
        self._pictures.decode(wanted, self._provided)
        return True

    def _provided(self, picture: EncodedFrame) -> None:
        self._found = picture
        self._wake()

    def watch(self) -> bool:
        """The alerts that are due, or the next frame; False when there is nothing to do."""
        if self.is_background and self._answer():
            return True
        if self._call(StepCall(turn=Turn.WATCH, frames_waiting=self.frames_waiting)):
            return True
        if self._session is None or not self._session.takes_frames:
            return False
        frame = self._next_frame()
        return frame is not None and self._call(
            FrameCall(frame=frame, frames_waiting=len(self._queue))
        )

    def _next_frame(self) -> EncodedFrame | None:
        """One that does not take long; None also while it is made so."""
        if self._decoding is not None:
            frame, self._decoded = self._decoded, None
            if frame is not None:
                self._decoding = None
            return frame
        if self._wanted is not None:  # by the time it is there the question must still fit it
            return None
        frame = self._queue.take()
        if frame is None or self._pictures is None or not frame.is_dear:
            return frame
        self._decoding = frame
        self._pictures.decode(frame, self._made)
        return None

    def _made(self, frame: EncodedFrame) -> None:
        self._decoded = frame
        self._wake()

    def step(self) -> bool:
        """One unit of a session that has the engines for itself: an answer's tokens and frames
        alternate. Several sessions take turns, see `Scheduler`."""
        self.take_messages()
        decoding = self._session is not None and self._session.is_decoding
        if self.answer() and not decoding:
            return True
        return self.watch() or decoding

    def after_round(self) -> None:
        """What is due by time, and whoever waits for the end of the answers."""
        if self._session is not None and self._clock_ns() >= self._next_stats_ns:
            self._next_stats_ns = self._clock_ns() + STATS_INTERVAL_NS
            received, dropped = self._queue.counts()
            self._call(StatsCall(frames_received=received, frames_dropped=dropped))
        is_idle = self._session is None or not (self._inbox or self._session.is_answering)
        if is_idle and self._on_idle is not None:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    def close(self) -> None:
        """Ends the session: every frame and question gets its outcome."""
        self.take_messages()
        if self._session is not None:
            self._call(CloseCall())
            if self._decoding is not None:
                self._drop(self._queue.give_up(self._decoding))
            self._drop(self._queue.empty())
            self._end()
        self.after_round()

    def _call(self, call: Call) -> bool:
        """One call; False when there was nothing to do. A bug in one session must not take the
        others down."""
        session = self._session
        if session is None:
            return False
        now_ns = self._clock_ns()
        try:
            settings = session.settings
            done = perform(session, call, now_ns)
            if session.settings is not settings:  # before they are announced
                settings = session.settings
                self._queue.configure(delivery=settings.delivery, fps_cap=settings.fps_cap)
            if done:
                self._report(call, now_ns, session)
            return done
        except Exception:  # a bug: the viewer gets an error event
            log.exception("a session failed")
            error = InternalError("the session failed", remedy="see the server's log")
            try:
                self._report(call, now_ns, session, protocol.error_event(error))
            finally:
                self._end()
                self._on_failure()
            return False

    def _report(
        self,
        call: Call,
        now_ns: int,
        session: Session,
        *last: protocol.ServerEvent,
    ) -> None:
        done_ns = self._clock_ns()
        events = [*session.events(done_ns), *last]
        if self._call_log is not None:
            texts = tuple(protocol.encode(event) for event in events)
            called = Called(call=call, now_ns=now_ns, done_ns=done_ns, events=texts)
            self._call_log.write(called)
        if events or isinstance(call, MessageCall):
            self._send(events)

    def _end(self) -> None:
        self._session = None
        if self._call_log is not None:
            self._call_log.close()
