"""What becomes of frames: as they came, dropped, shown to a question, forgotten."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import EdgeVlmError, FrameDecodeError
from edge_vlm.pixels.codec.cost import is_cheap
from edge_vlm.pixels.duplicates import THUMBNAIL
from edge_vlm.pixels.frames import decode_jpeg, decode_picture, shrink_jpeg, thumbnail
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason


class Encoding(str, Enum):
    JPEG = "jpeg"
    RAW = "raw"
    """What `edge_vlm.pixels.frames.raw_picture` makes."""
    STILL = "still"
    """A picture that somebody put into a conversation, JPEG, PNG, WebP or GIF: no rule about live
    video drops it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """What was made of a picture before the session asked for it."""

    rgb: npt.NDArray[np.uint8]
    """[H, W, 3]."""
    small: npt.NDArray[np.float32]
    """[THUMBNAIL, THUMBNAIL]."""
    evidence: bytes | None
    """A JPEG as an alert shows it; None if it cannot be made."""


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
    ahead: Decoded | FrameDecodeError | None = field(default=None, repr=False, compare=False)
    """The same as the session makes of it, done elsewhere; in no recording."""

    @property
    def is_dear(self) -> bool:
        """Decoding it here would keep others waiting."""
        if self.ahead is not None or self.encoding is Encoding.RAW or self.data[:3] == b"P6\n":
            return False
        return not is_cheap(self.data)

    def decode(self) -> npt.NDArray[np.uint8]:
        """rgb u8 [H, W, 3]. Raises FrameDecodeError."""
        if isinstance(self.ahead, FrameDecodeError):
            raise self.ahead
        if self.ahead is not None:
            return self.ahead.rgb
        is_jpeg = self.encoding is Encoding.JPEG
        return decode_jpeg(self.data) if is_jpeg else decode_picture(self.data)

    def small(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """`rgb`: what `decode` returned."""
        return self.ahead.small if isinstance(self.ahead, Decoded) else thumbnail(rgb, THUMBNAIL)

    def decoded_ahead(self, max_evidence_bytes: int) -> EncodedFrame:
        """With all that takes long done."""
        try:
            rgb = self.decode()
        except FrameDecodeError as error:
            return replace(self, ahead=error)
        evidence = None
        with suppress(FrameDecodeError, ValueError):
            evidence = shrink_jpeg(self.data, max_evidence_bytes)
        small = thumbnail(rgb, THUMBNAIL)
        return replace(self, ahead=Decoded(rgb=rgb, small=small, evidence=evidence))

    def as_it_came(self) -> EncodedFrame:
        """Without what was made of it."""
        return self if self.ahead is None else replace(self, ahead=None)


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
