"""Binary messages: a picture behind a fixed header, and its bytes. No I/O here."""

from __future__ import annotations

import operator
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_vlm.errors import FrameDecodeError, ProtocolError, UnknownMessageType
from edge_vlm.pixels.frames import raw_picture, samples_of
from edge_vlm_runtime.protocol.base import MAX_CAPTURE_TIME_US

if TYPE_CHECKING:
    import numpy as np

from enum import Enum

HEADER = struct.Struct("<BBHHHIIQ")
"""version u8, type u8, flags u16, stream id u16, reserved u16, sequence u32, payload length u32,
capture time in microseconds u64; little-endian, 24 bytes."""
HEADER_VERSION = 1
TYPE_JPEG = 1
TYPE_RAW = 2
RAW_SIZE = struct.Struct("<HH")
"""width u16, height u16, little-endian: before the samples of a raw picture."""
MAX_RAW_SIDE = 0xFFFF


@dataclass(frozen=True, kw_only=True)
class FrameMessage:
    """A picture from the client."""

    sequence: int
    """Number the client gives its frames, rising; the outcome of the frame names it."""
    capture_time_us: int
    """When the picture was taken, microseconds on the client's clock from any starting point."""
    payload: bytes | memoryview
    """A JPEG (bytes), or width, height and RGB samples row by row."""
    kind: int = TYPE_JPEG
    payload_length: int
    """What the header announced; differs from the payload when the message was cut."""

    def encode(self) -> bytes:
        head = HEADER.pack(
            HEADER_VERSION,
            self.kind,
            0,
            0,
            0,
            self.sequence & 0xFFFFFFFF,
            self.payload_length,
            self.capture_time_us,
        )
        return head + self.payload

    def picture(self) -> bytes:
        """What `pixels.frames.decode_picture` reads. Raises FrameDecodeError on a payload of the
        wrong length."""
        if len(self.payload) != self.payload_length:
            raise FrameDecodeError(
                f"the header announces {self.payload_length} bytes, {len(self.payload)} came"
            )
        if self.kind == TYPE_JPEG:
            return bytes(self.payload)  # itself, if it is bytes
        if len(self.payload) < RAW_SIZE.size:
            raise FrameDecodeError("a raw picture without width and height")
        width, height = RAW_SIZE.unpack_from(self.payload)
        return raw_picture(self.payload[RAW_SIZE.size :], width, height)


def frame_message(sequence: int, capture_time_us: int, jpeg: bytes) -> FrameMessage:
    return FrameMessage(
        sequence=sequence, capture_time_us=capture_time_us, payload=jpeg, payload_length=len(jpeg)
    )


def capture_time(pts_us: object) -> int:
    """The time as the header takes it. Raises ValueError for anything but whole microseconds that
    fit there."""
    try:
        time_us = operator.index(pts_us)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"pts_us must be a whole number of microseconds, got {pts_us!r}: round(seconds * 1e6)"
        ) from None
    if not 0 <= time_us <= MAX_CAPTURE_TIME_US:
        raise ValueError(f"pts_us must be 0..{MAX_CAPTURE_TIME_US} microseconds, got {time_us}")
    return time_us


def raw_frame_message(sequence: int, capture_time_us: int, rgb: np.ndarray) -> FrameMessage:
    """rgb u8 [H, W, 3]. Raises ValueError for a side of more than MAX_RAW_SIDE."""
    if max(rgb.shape) > MAX_RAW_SIDE:
        raise ValueError(f"a raw frame has sides of up to {MAX_RAW_SIDE}, got {list(rgb.shape)}")
    payload = RAW_SIZE.pack(rgb.shape[1], rgb.shape[0]) + samples_of(rgb)
    return FrameMessage(
        sequence=sequence,
        capture_time_us=capture_time_us,
        payload=payload,
        payload_length=len(payload),
        kind=TYPE_RAW,
    )


def decode_frame_message(data: bytes) -> FrameMessage:
    """Raises ProtocolError (no whole header, other version), UnknownMessageType (not a frame).

    A payload of another length than announced is returned as it is: the header is readable, so the
    frame can be given an outcome.
    """
    if len(data) < HEADER.size:
        raise ProtocolError(
            f"a binary message of {len(data)} bytes has no whole {HEADER.size}-byte header"
        )
    version, kind, _flags, _stream, _reserved, sequence, length, time_us = HEADER.unpack_from(data)
    if version != HEADER_VERSION:
        raise ProtocolError(f"binary header version {version}, this side reads {HEADER_VERSION}")
    if time_us > MAX_CAPTURE_TIME_US:
        raise ProtocolError(f"capture time of {time_us} microseconds is out of range")
    if kind not in (TYPE_JPEG, TYPE_RAW):
        raise UnknownMessageType(
            f"unknown binary message type {kind}", remedy="1 is a JPEG frame, 2 a raw one"
        )
    return FrameMessage(
        sequence=sequence,
        capture_time_us=time_us,
        # Megabytes, if it is a raw one: they are copied once, with the picture's own header.
        payload=memoryview(data)[HEADER.size :] if kind == TYPE_RAW else data[HEADER.size :],
        payload_length=length,
        kind=kind,
    )


class DropReason(str, Enum):
    BUSY = "busy"
    """A newer frame came before the engines were free (live), or too many at once (wait)."""
    RATE = "rate"
    """Above the session's `fps_cap`."""
    STALE = "stale"
    """Waited too long, or not newer than the frame before it."""
    DUPLICATE = "duplicate"
    """Looks like the last frame that was encoded."""
    DECODE_ERROR = "decode_error"
    """Not a JPEG that can be read."""
    ENGINE_ERROR = "engine_error"
    """The engines failed on it; `code` and `message` say how."""
    CLIP_FULL = "clip_full"
    """More of a clip than can be held until its cells are chosen (policy `clip`)."""
