"""A session without a server, for a robot's own loop: frames in, questions asked, answers out.

with LoadedBundle.open(folder) as bundle, bundle.session() as session:
    session.send_frame(rgb)
    print(session.ask("what is there?").shown_text)

Everything is done on the caller's thread, and has been done when a call returns.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from edge_vlm.errors import EdgeVlmError, InternalError, SessionError, SessionGone
from edge_vlm.pixels.frames import raw_frame, require_rgb
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.messages import error_from_detail
from edge_vlm_runtime.protocol.settings import DropPolicy, ServerLimits, SessionSettings
from edge_vlm_runtime.protocol.typed import (
    RuleFields,
    Settings,
    checked,
    require_known,
    require_plain_function,
)
from edge_vlm_runtime.session.budget import default_settings
from edge_vlm_runtime.session.frames import EncodedFrame, Encoding
from edge_vlm_runtime.session.session import Session

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from edge_vlm_runtime.inference.bundle_model import LoadedBundle

Outcome = protocol.FrameAccepted | protocol.FrameDropped
Detail = Literal["video", "snapshot", "both", "text"]
Reply = TypeVar("Reply", bound=protocol.ServerEvent)


class InProcessSession:
    """One stream. For the thread that owns the bundle; several sessions may take turns. Use as a
    context manager or call `close`."""

    def __init__(
        self,
        engines: LoadedBundle,
        settings: Settings | None = None,
        *,
        limits: ServerLimits | None = None,
        on_event: Callable[[protocol.ServerEvent], None] | None = None,
    ) -> None:
        """What `settings` leaves out is as the bundle was made for, except that no frame is dropped
        (`delivery` is "wait"). `on_event` gets everything that the session says, inside the call
        that leads to it. Raises ConfigError."""
        self._engines = engines
        self._require_open()
        limits = limits or ServerLimits()
        require_plain_function(on_event)
        require_known(settings or {}, Settings, "session settings")
        own: dict[str, Any] = {"delivery": DropPolicy.WAIT, **(settings or {}), "raw_frames": True}
        update = checked(protocol.SessionUpdate, "session settings", session=own)
        assert isinstance(update, protocol.SessionUpdate)
        self.on_event = on_event
        self._clock_ns = time.monotonic_ns
        self._session = Session(
            engines=engines,
            settings=default_settings(engines.bundle, limits).changed(update.session.fields()),
            limits=limits,
            now_ns=self._clock_ns(),
            stopwatch_ns=self._clock_ns,
        )
        self._handle = SessionHandle(
            self._session, limits, clock_ns=self._clock_ns, send=self._take
        )
        self._sequences = itertools.count(1)
        self._ids = itertools.count(1)
        self._replies: dict[str | int, protocol.ServerEvent | None] = {}
        """What answers the calls under way, by `event_id` or number of the frame."""
        self._untold: deque[protocol.ServerEvent] = deque()
        """For `on_event`, which is called when the session is done: what it raises is its own."""
        self._answers: dict[str, InProcessAnswer] = {}
        """Those that are not done, by `event_id` before they begin and `response_id` then."""

    @property
    def settings(self) -> SessionSettings:
        """In force now."""
        return self._session.settings

    def _take(self, events: list[protocol.ServerEvent]) -> None:
        for event in events:
            self._route(event)
        if self.on_event is not None:
            self._untold.extend(events)

    def _tell(self) -> None:
        while self._untold and self.on_event is not None:
            self.on_event(self._untold.popleft())

    def _route(self, event: protocol.ServerEvent) -> None:
        key = getattr(event, "event_id", None)
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            key = event.frame_sequence
        elif isinstance(event, protocol.Error):
            key = event.error.event_id
            if key in self._answers:
                self._answers.pop(key).finish(error_from_detail(event.error))
        elif isinstance(event, protocol.ResponseCreated) and key in self._answers:
            answer = self._answers[event.response_id] = self._answers.pop(key)
            answer.response_id = event.response_id
        elif isinstance(event, protocol.ResponseOutputTextDelta):
            if event.response_id in self._answers:
                self._answers[event.response_id].push(event.delta)
        elif isinstance(event, protocol.ResponseDone) and event.response_id in self._answers:
            self._answers.pop(event.response_id).finish(event)
        if key in self._replies:
            self._replies[key] = event

    # ---- frames ------------------------------------------------------------------------------

    def send_frame(self, picture: bytes | np.ndarray, pts_us: int | None = None) -> Outcome:
        """Encodes one picture, a JPEG or rgb u8 [H, W, 3], checks the alerts, and says what became
        of it. `pts_us`: when it was taken, in microseconds from any starting point; without it,
        now.

        Raises ValueError for what is neither; a frame that is not taken is a `FrameDropped`.
        """
        if isinstance(picture, bytes):
            data, encoding = picture, Encoding.JPEG
        else:
            require_rgb(picture)
            data = raw_frame(picture)
            encoding = Encoding.RAW
        now_ns = self._clock_ns()
        sequence = next(self._sequences)
        frame = EncodedFrame(
            seq=sequence,
            capture_us=now_ns // 1000 if pts_us is None else protocol.capture_time(pts_us),
            received_ns=now_ns,
            data=data,
            encoding=encoding,
        )
        with self._alone():
            outcome = self._call(sequence, lambda: self._handle.put_frame(frame))
            assert isinstance(outcome, (protocol.FrameAccepted, protocol.FrameDropped))
            while self._handle.watch():  # the alerts that are due
                pass
            self._tell()
        return outcome

    # ---- questions ---------------------------------------------------------------------------

    def ask(self, text: str, detail: Detail = "video") -> protocol.ResponseDone:
        """The whole answer. `detail`: what is looked at, see `response.create`. Raises NoFrameYet
        and the other typed errors of a session."""
        return self.start_answer(text, detail).answer()

    def start_answer(self, text: str, detail: Detail = "video") -> InProcessAnswer:
        """Iterate over it for the pieces of the answer, each decoded when it is asked for; frames
        may be sent in between. A question waits for the answer before it."""
        event_id = self._event_id()
        message = checked(
            protocol.ResponseCreate, "question", text=text, detail=detail, event_id=event_id
        )
        with self._alone():
            answer = self._answers[event_id] = InProcessAnswer(self)
            self._handle.take(message)
            self._handle.take_messages()
            self._tell()
        answer.raise_failure()
        return answer

    def cancel(self, response_id: str | None = None) -> None:
        """Stops one answer, or all that are under way or waiting."""
        with self._alone():
            self._handle.take(protocol.ResponseCancel(response_id=response_id))
            self._handle.take_messages()
            self._tell()

    # ---- alerts ------------------------------------------------------------------------------

    def create_alert(self, question: str, **rule: Unpack[RuleFields]) -> messages.AlertStatus:
        """Watches for something from now on; `rule`: the other fields of `alert.create`. Begins and
        ends come to `on_event`. Raises as `Client.create_alert`."""
        require_known(rule, RuleFields, "alert rule")
        event_id = self._event_id()
        kind = messages.AlertCreate
        message = checked(kind, "alert rule", question=question, event_id=event_id, **rule)
        return self._request(messages.AlertCreated, message).alert

    def list_alerts(self) -> list[messages.AlertStatus]:
        """All alerts and where they stand."""
        message = messages.AlertList(event_id=self._event_id())
        return self._request(messages.AlertListed, message).alerts

    def delete_alert(self, alert_id: str) -> None:
        """Raises UnknownAlert."""
        kind = messages.AlertDelete
        message = checked(kind, "alert", alert_id=alert_id, event_id=self._event_id())
        self._request(messages.AlertDeleted, message)

    def update(self, settings: Settings) -> SessionSettings:
        """Changes settings from the next frame and question on. Raises ConfigError."""
        require_known(settings, Settings, "session settings")
        own = {**settings, "raw_frames": True}  # arrays are sent as they are
        event_id = self._event_id()
        kind = protocol.SessionUpdate
        message = checked(kind, "session settings", session=own, event_id=event_id)
        return self._request(protocol.SessionUpdated, message).settings

    # ---- the work ----------------------------------------------------------------------------

    def _event_id(self) -> str:
        return f"event_{next(self._ids)}"

    def _require_open(self) -> None:
        """Raises SessionGone."""
        if self._engines.is_closed:
            raise SessionGone("the bundle was closed", remedy="close it after its sessions")

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Raises SessionError when another thread is in a call."""
        if not self._engines.in_call.acquire(blocking=False):
            raise SessionError(
                "another thread is using this bundle",
                remedy="keep a bundle and its sessions to one thread, or share a lock",
            )
        try:
            yield
        finally:
            self._engines.in_call.release()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises as `_in_turn`, and SessionGone after the end."""
        with self._in_turn():
            if self._handle.session is None:
                raise SessionGone("the session has ended", remedy="begin another one")
            self._require_open()
            yield

    def _call(self, key: str | int, begin: Callable[[], None]) -> protocol.ServerEvent:
        """Works until there is the event that answers it. Raises what the session says instead."""
        self._replies[key] = None
        try:
            begin()
            self._handle.take_messages()
            self._tell()
            while self._replies[key] is None and self.work():
                pass
            reply = self._replies[key]
        finally:
            del self._replies[key]
        if isinstance(reply, protocol.Error):
            raise error_from_detail(reply.error)
        if reply is None:
            raise _failed()
        return reply

    def _request(self, kind: type[Reply], message: protocol.ClientMessage) -> Reply:
        assert message.event_id is not None
        event_id = message.event_id
        with self._alone():
            reply = self._call(event_id, lambda: self._handle.take(message))
        assert isinstance(reply, kind)
        return reply

    def work(self) -> bool:
        """One unit; False when there is nothing to do."""
        with self._alone():
            worked = self._handle.watch() or self._handle.answer()
            self._tell()
        return worked

    def close(self) -> None:
        """Ends the session and frees its memory; twice does no harm. Raises SessionError while
        another thread is in a call."""
        if self._handle.session is not None:
            with self._in_turn():
                self._handle.close()
        self._tell()

    def __enter__(self) -> InProcessSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _failed() -> InternalError:
    return InternalError("the session failed", remedy="see the log, and begin another one")


class InProcessAnswer:
    """One answer: iterate for its pieces, then read `answer`."""

    def __init__(self, session: InProcessSession) -> None:
        self._session = session
        self.response_id: str | None = None
        self._deltas: deque[str] = deque()
        self._result: protocol.ResponseDone | EdgeVlmError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._deltas:
            if self._result is not None:
                self.raise_failure()
                raise StopIteration
            self._work()
        return self._deltas.popleft()

    def answer(self) -> protocol.ResponseDone:
        """The whole answer."""
        while self._result is None:
            self._work()
        self.raise_failure()
        assert isinstance(self._result, protocol.ResponseDone)
        return self._result

    def _work(self) -> None:
        if not self._session.work() and self._result is None:
            self.finish(_failed())

    def raise_failure(self) -> None:
        """Raises what came instead of an answer."""
        if isinstance(self._result, EdgeVlmError):
            raise self._result

    def push(self, delta: str) -> None:
        """The next piece."""
        self._deltas.append(delta)

    def finish(self, result: protocol.ResponseDone | EdgeVlmError) -> None:
        self._result = result
