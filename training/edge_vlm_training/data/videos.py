"""Video files: chosen moments of them as pictures, and pictures as a file.

PyAV is imported here and nowhere else in this package.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import MissingExtraError, VideoEmpty, VideoNotFound, VideoUnreadable
from edge_vlm.pixels.video import TEXT_FORMATS

_EPSILON_S = 1e-4
_RAW_FPS = 25.0
_JUMP_S = 1.0
"""A keyframe nearer than this is reached by decoding on."""
_LOST_S = 0.25
"""How much of a file's end may be missing behind its last readable frame, beyond one frame."""


@dataclasses.dataclass(frozen=True)
class VideoTimes:
    """When the frames of a file are shown, from its packets alone: nothing is decoded."""

    num_frames: int
    end_s: float
    """Of the last frame, from the first one."""
    frame_s: float
    """Mean distance of two frames; 0 for a single one."""
    keys_s: tuple[float, ...]
    """Ascending times of the frames from which decoding can begin; none if the file has no times of
    its own."""


@functools.lru_cache(maxsize=100_000)
def probe_video(path: Path) -> VideoTimes:
    """Reads the times of all frames of a file.

    Raises VideoNotFound, VideoUnreadable (not a video), VideoEmpty.
    """
    times: list[float] = []
    keys: list[float] = []
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or _RAW_FPS)
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None:  # a raw stream: frames come at the rate of the stream
                times.append(len(times) / rate)
                continue
            times.append(float(packet.pts * stream.time_base))
            if packet.is_keyframe:
                keys.append(times[-1])
    if not times:
        raise VideoEmpty("there is no frame in it", where=path)
    start_s, end_s = min(times), max(times) - min(times)
    frame_s = end_s / (len(times) - 1) if len(times) > 1 else 0.0
    keys_s = tuple(sorted(key - start_s for key in keys))
    return VideoTimes(len(times), end_s, frame_s, keys_s)


def read_moments(path: Path, times_s: Sequence[float]) -> Iterator[npt.NDArray[np.uint8]]:
    """The picture shown at each of these ascending times (seconds from the first frame).

    rgb u8 [H, W, 3] each. A time behind the last frame shows the last one; if the file breaks off
    clearly before a time that its packets promise, that is VideoUnreadable. Stretches between far
    moments are jumped over where the file allows it. Raises as `probe_video`, too.
    """
    probed = probe_video(path)
    wanted = list(times_s)
    served = 0
    try:
        for picture in _moments(path, probed, wanted, probed.keys_s):
            yield picture
            served += 1
    except _LostJump:  # its index is wrong: every frame is decoded
        yield from _moments(path, probed, wanted[served:], ())


class _LostJump(Exception):
    """A jump did not land where the file's keyframes promised."""


def _moments(
    path: Path, probed: VideoTimes, wanted: list[float], keys_s: Sequence[float]
) -> Iterator[npt.NDArray[np.uint8]]:
    """As `read_moments`; jumps to `keys_s` only."""
    served = 0
    shown: Any = None
    shown_s = 0.0
    jumped = False
    with _opened(path) as (container, stream):
        start_s: float | None = None
        rate = float(stream.average_rate or _RAW_FPS)
        frames = container.decode(stream)
        for i in itertools.count():
            frame = next(frames, None)
            if frame is None:
                break
            raw_s = i / rate if frame.time is None else float(frame.time)
            start_s = raw_s if start_s is None else start_s
            time_s = raw_s - start_s
            if jumped and time_s > wanted[served] + _EPSILON_S:
                raise _LostJump
            jumped = False
            while shown is not None and served < len(wanted):
                if wanted[served] >= time_s - _EPSILON_S:
                    break
                yield shown.to_ndarray(format="rgb24")
                served += 1
            if served == len(wanted):
                return
            shown, shown_s = frame, time_s
            nearest = bisect.bisect_right(keys_s, wanted[served] + _EPSILON_S) - 1
            if nearest >= 0 and keys_s[nearest] > shown_s + _JUMP_S:
                place = round((keys_s[nearest] + start_s) / stream.time_base)
                container.seek(place, stream=stream, backward=True)
                frames = container.decode(stream)
                jumped = True
    if jumped:
        raise _LostJump
    for time_s in wanted[served:]:
        if shown is None or min(time_s, probed.end_s) > shown_s + probed.frame_s + _LOST_S:
            raise VideoUnreadable(
                f"the video breaks off behind {shown_s:.2f} s", where=path, remedy="copy it anew"
            )
        yield shown.to_ndarray(format="rgb24")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and first video stream; faults of the library become ours."""
    if not path.is_file():
        raise VideoNotFound("no such file", where=path)
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or set(container.format.name.split(",")) & TEXT_FORMATS:
                raise VideoUnreadable("there is no video in it", where=path)
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoUnreadable(f"not a video, or broken ({error})", where=path) from error


def write_video(path: Path, frames: npt.NDArray[np.uint8], fps: float) -> None:
    """Writes u8 [T, H, W, 3] as H.264 at `fps` (a whole number)."""
    av = _av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError.for_library("av", "train") from error
    return av
