"""The pictures of a recorded session, as footage for `edge-vlm calibrate`: entry point of
`edge_vlm.footage`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_vlm.errors import FrameDecodeError, VideoUnreadable
from edge_vlm.pixels.frames import Rgb, decode_jpeg, decode_picture
from edge_vlm_runtime.recording.file import Recording
from edge_vlm_runtime.session.calls import Called, FrameCall
from edge_vlm_runtime.session.frames import DroppedFrame, Encoding


def pictures(path: Path) -> Iterator[tuple[float, Rgb]]:
    """Capture time in seconds from the first picture, rgb u8 [H, W, 3]; dropped ones too.

    Raises RecordingError, VideoUnreadable for a picture that is none."""
    first_us: int | None = None
    with Recording.open(path) as recording:
        for entry in recording.entries():
            if isinstance(entry, DroppedFrame):
                frame = entry.frame
            elif isinstance(entry, Called) and isinstance(entry.call, FrameCall):
                frame = entry.call.frame
            else:
                continue
            first_us = frame.capture_us if first_us is None else first_us
            decode = decode_jpeg if frame.encoding is Encoding.JPEG else decode_picture
            try:
                rgb = decode(frame.data)
            except FrameDecodeError as error:
                raise VideoUnreadable(error.what, where=path) from error
            yield (frame.capture_us - first_us) * 1e-6, rgb
