"""Large pictures other than JPEGs, decoded by a process of their own.

Pillow keeps every other thread of its process waiting while it decodes a WebP picture or turns a
palette (of any GIF) or what can be seen through into RGB, and does neither by parts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import FrameDecodeError

_MOST_WEBP, _MOST_OTHER = 1_000_000, 4_000_000
"""Pixels of pictures that others have to wait for by some 30 ms, less than a process takes to
begin."""
NICENESS = 5
_CODE = (
    "import sys; sys.path[:] = sys.argv[1:]; from edge_vlm.pixels.codec.large import main; main()"
)
_turns = threading.BoundedSemaphore(2)
"""Of processes at once: the largest picture takes one of them a gigabyte."""
_LONGEST_LINE = 1000
_SIZE = re.compile(rb"(\d{1,8}) (\d{1,8})\n")


def is_large(data: bytes, num_pixels: int) -> bool:
    """Of a PNG, WebP or GIF."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return num_pixels > (_MOST_WEBP if is_webp else _MOST_OTHER)


def decode_elsewhere(data: bytes) -> npt.NDArray[np.uint8]:
    """rgb u8 [H, W, 3], as `frames.decode_still`. Raises FrameDecodeError."""
    with _turns:
        return _decode_elsewhere(data)


def _decode_elsewhere(data: bytes) -> npt.NDArray[np.uint8]:
    try:
        worker = subprocess.Popen(
            [sys.executable, "-c", _CODE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which may want to end its answers
        )
    except OSError as error:
        raise FrameDecodeError(f"no process to decode it could be begun: {error}") from error
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(BrokenPipeError), worker.stdin as picture:  # it says why below
            picture.write(data)
        said = worker.stdout.readline(_LONGEST_LINE)
        size = _SIZE.fullmatch(said)
        if size is not None:
            rgb = np.empty((int(size[2]), int(size[1]), 3), np.uint8)
            if _fill(rgb.reshape(-1).data, worker.stdout):
                return rgb
            said = b""
    raise FrameDecodeError(
        said.decode(errors="replace").strip()
        or f"the decoder of the picture ended with {worker.returncode}",
        where=f"{len(data)} bytes",
    )


def _fill(room: memoryview, stream: Any) -> bool:
    """Whether there was enough. Other threads go on meanwhile."""
    while len(room) and (number := stream.readinto(room)):
        room = room[number:]
    return not len(room)


def main() -> None:
    """A picture from standard input: its size and samples to standard output, or what is wrong."""
    from edge_vlm.pixels.frames import decode_still

    if hasattr(os, "nice"):
        os.nice(NICENESS)
    out: BinaryIO = sys.stdout.buffer
    try:
        rgb = decode_still(sys.stdin.buffer.read())
    except FrameDecodeError as error:
        out.write(error.what.encode(errors="replace"))
        return
    out.write(b"%d %d\n" % (rgb.shape[1], rgb.shape[0]))
    out.write(np.ascontiguousarray(rgb).reshape(-1).data)
    out.flush()
