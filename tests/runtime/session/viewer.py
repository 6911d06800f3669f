"""A viewer of one session, without sockets or threads: a clock that stands still unless told."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.connection import error_from_detail
from edge_vlm_runtime.engine_thread.handle import CallLog, SessionHandle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.session.budget import default_settings
from edge_vlm_runtime.session.context import StreamContext
from edge_vlm_runtime.session.frames import EncodedFrame, Encoding
from edge_vlm_runtime.session.session import Session
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.session.fake_engines import FakeBundle, FakeClock

Event = TypeVar("Event", bound=protocol.ServerEvent)
LIMITS = ServerLimits(max_queued_questions=3)


class Viewer:
    """A session with everything it said."""

    def __init__(
        self,
        engines: Any = None,
        clock: FakeClock | None = None,
        *,
        limits: ServerLimits = LIMITS,
        call_log: CallLog | None = None,
        **changes: Any,
    ) -> None:
        self.clock = clock or FakeClock()
        self.engines = engines or FakeBundle(self.clock)
        self.events: list[protocol.ServerEvent] = []
        defaults = default_settings(cast(Any, self.engines.bundle), limits)
        self.session = Session(
            engines=cast(LoadedBundle, self.engines),
            settings=defaults.changed({"delivery": "wait", **changes}),
            limits=limits,
            now_ns=self.clock(),
            stopwatch_ns=self.clock,
        )
        self.handle = SessionHandle(
            self.session,
            limits,
            clock_ns=self.clock,
            send=self.events.extend,
            call_log=call_log,
        )
        self.put_frames: list[int] = []
        self.step, self.answer, self.watch = (
            self.handle.step,
            self.handle.answer,
            self.handle.watch,
        )

    @property
    def settings(self) -> SessionSettings:
        return self.session.settings

    @property
    def context(self) -> StreamContext:
        return self.session._context

    @property
    def arena(self) -> KVArena:
        return self.context._arena

    def put(
        self,
        seq: int,
        data: bytes | None = None,
        at_s: float | None = None,
        encoding: Encoding = Encoding.JPEG,
    ) -> None:
        at_s = seq * 0.5 if at_s is None else at_s
        self.put_frames.append(seq)
        self.handle.put_frame(
            EncodedFrame(
                seq=seq,
                capture_us=round(at_s * 1e6),
                received_ns=self.clock(),
                data=jpeg(seq % 40) if data is None else data,
                encoding=encoding,
            )
        )

    def take(self, message: protocol.ClientMessage) -> None:
        """Raises what it is refused with."""
        num_before = len(self.events)
        self.handle.take(message)
        self.handle.take_messages()
        refusal = self.events[-1] if len(self.events) > num_before else None
        if isinstance(refusal, protocol.Error) and not isinstance(message, protocol.ResponseCancel):
            self.events.pop()
            raise error_from_detail(refusal.error)

    def ask(
        self,
        text: str = "what colour is the cube ?",
        event_id: str | None = None,
        detail: Any = "video",
    ) -> None:
        self.take(protocol.ResponseCreate(text=text, event_id=event_id, detail=detail))

    def update(self, **changes: Any) -> None:
        self.take(protocol.SessionUpdate(session=protocol.SettingsPatch(**changes)))

    def cancel(self, response_id: str | None = None) -> None:
        self.take(protocol.ResponseCancel(response_id=response_id))

    def close(self) -> None:
        self.handle.close()

    def run(self) -> None:
        while self.step():
            pass

    def show(self, *seqs: int) -> None:
        for seq in seqs:
            self.put(seq)
            self.run()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def outcomes(self) -> list[int]:
        return sorted(
            event.frame_sequence
            for event in self.events
            if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped))
        )

    def drop_reasons(self) -> dict[int, str]:
        return {event.frame_sequence: event.reason for event in self.of(protocol.FrameDropped)}
