"""What becomes of frames: as they came, dropped, shown to a question, forgotten."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class Evicted:
    """Frames that were forgotten, to make room or because the engines failed."""

    frames: int
    tokens: int


@dataclass(frozen=True)
class Rebased:
    """What is remembered was given fresh positions, and fresh stamps if those ran out."""

    frames: int
    time_offset_s: float


Change = Evicted | Rebased


@dataclass(frozen=True)
class ShownFrame:
    """A frame as a question sees it."""

    seq: int
    stamp_s: float
    """The time that is written before it."""
    capture_s: float
    """Seconds since the first frame of the stream."""


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together: those of a frame or of a picture."""

    embeds: npt.NDArray[np.float32]
    is_vision: npt.NDArray[np.bool_]
