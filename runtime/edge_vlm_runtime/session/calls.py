"""Everything that is ever asked of a session, as values.

Whoever owns a session makes these calls through `perform`, so a list of them with their times is a
recording, and performing them again is its replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_vlm_runtime import protocol
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.session import Turn

if TYPE_CHECKING:
    from edge_vlm_runtime.session.session import Session


@dataclass(frozen=True, kw_only=True)
class FrameCall:
    """The next frame."""

    frame: EncodedFrame
    frames_waiting: int
    """Frames that wait after it."""


@dataclass(frozen=True, kw_only=True)
class MessageCall:
    """What the viewer asks for."""

    message: protocol.ClientMessage
    received_ns: int
    """When it came."""
    video_s: float
    """Capture time of the newest frame that had come by then, since the first one. Not for the
    session; whoever reads a recording wants to know."""
    frames_waiting: int


@dataclass(frozen=True, kw_only=True)
class StepCall:
    """A unit of work."""

    turn: Turn
    frames_waiting: int


@dataclass(frozen=True, kw_only=True)
class StatsCall:
    """`session.stats` is due."""

    frames_received: int
    frames_dropped: dict[str, int]
    """By reason, of those that never came to the session."""


@dataclass(frozen=True)
class CloseCall:
    """The session ends."""


Call = FrameCall | MessageCall | StepCall | StatsCall | CloseCall


@dataclass(frozen=True, kw_only=True)
class Called:
    """A call, and what came of it."""

    call: Call
    now_ns: int
    """When it was made."""
    done_ns: int
    """When its events were fetched."""
    events: tuple[str, ...]
    """JSON texts of what the session said, without numbers."""


def perform(session: Session, call: Call, now_ns: int) -> bool:
    """False when there was nothing to do; then nothing has changed."""
    if isinstance(call, FrameCall):
        session.receive_frame(call.frame, now_ns, frames_waiting=call.frames_waiting)
    elif isinstance(call, MessageCall):
        session.receive_message(
            call.message,
            now_ns,
            received_ns=call.received_ns,
            frames_waiting=call.frames_waiting,
        )
    elif isinstance(call, StepCall):
        return session.step(call.turn, now_ns, frames_waiting=call.frames_waiting)
    elif isinstance(call, StatsCall):
        session.report_stats(
            now_ns, frames_received=call.frames_received, frames_dropped=call.frames_dropped
        )
    else:
        session.close(now_ns)
    return True
