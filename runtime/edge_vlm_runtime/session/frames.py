"""One frame as it came, and one that went no further."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason


class Encoding(str, Enum):
    JPEG = "jpeg"
    RAW = "raw"
    """What `edge_vlm.pixels.frames.raw_picture` makes."""
    STILL = "still"
    """A picture that somebody put into a conversation, JPEG, PNG, WebP or GIF: no rule about live
    video drops it."""


@dataclass(frozen=True, kw_only=True)
class EncodedFrame:
    """A picture as it arrived: one that is dropped is never decoded."""

    seq: int
    """The number its sender gave it."""
    capture_us: int
    """Capture time on the sender's clock."""
    received_ns: int
    """Arrival on the server's monotonic clock."""
    data: bytes = field(repr=False)
    encoding: Encoding = Encoding.JPEG


@dataclass(frozen=True, kw_only=True)
class DroppedFrame:
    """A frame that is not encoded, and why."""

    frame: EncodedFrame
    reason: DropReason
    code: str | None = None
    """Of the error, where the reason is one."""
    message: str | None = None

    @classmethod
    def of(
        cls, frame: EncodedFrame, reason: DropReason, error: EdgeVlmError | None = None
    ) -> DroppedFrame:
        if error is None:
            return cls(frame=frame, reason=reason)
        return cls(frame=frame, reason=reason, code=error.code, message=str(error))

    def event(self) -> protocol.FrameDropped:
        return protocol.FrameDropped(
            frame_sequence=self.frame.seq,
            reason=self.reason.value,
            code=self.code,
            message=self.message,
        )
