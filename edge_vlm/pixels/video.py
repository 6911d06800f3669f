"""Moving pictures: what a player shows, and when. Every stage reads video here and nowhere else.

`Video` opens a container, picks its track and gives `TimedFrame`s; `due_frames` and `read_moments`
choose among them by one rule: a frame is on screen from its own time until the next one's. Times
are the file's own, in seconds from its first frame. rgb is always u8 [H, W, 3].

PyAV is imported here and nowhere else in this package.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import (
    MissingExtraError,
    VideoEmpty,
    VideoError,
    VideoNotFound,
    VideoUnreadable,
)
from edge_vlm.pixels.frames import Rgb

EPSILON_S = 1e-4
"""How much before its time a frame counts as shown."""
MILLISECONDS_EPSILON_S = 6e-4
"""The same where a container rounds times to milliseconds, as Matroska does."""
TEXT_FORMATS = {"tty", "bin", "idf", "adf", "xbin"}
"""Demuxers that render any text as moving pictures."""
_RAW_FPS = 25.0
"""Of a stream that carries neither times nor a rate."""
_CUT_OFF_SHARE, _CUT_OFF_S = 0.1, 0.5
"""How much may be missing of the announced length: headers are not exact."""
_JUMP_S = 1.0
"""A keyframe nearer than this is reached by decoding on."""
_LOST_S = 0.25
"""How much of what the packets promise may be missing at the end, beyond one frame."""
_MATROSKA_DURATION = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True, eq=False)
class TimedFrame:
    """A decoded frame and when a player shows it: from `time_s` to `end_s`, or to the next one."""

    time_s: float
    end_s: float
    picture: Any
    """PyAV's."""
    name: str
    """Of the video, for errors."""

    def rgb(self) -> Rgb:
        """u8 [H, W, 3]. Raises VideoUnreadable."""
        try:
            return np.ascontiguousarray(self.picture.to_ndarray(format="rgb24"))
        except (_av().FFmpegError, ValueError) as error:
            raise VideoUnreadable(
                f"a frame cannot be converted ({error})", where=self.name
            ) from error


class Video:
    """An opened container and the track that is watched."""

    def __init__(
        self,
        file: Any,
        name: str,
        *,
        refused: str = "not a video, or cut off at its beginning",
        **options: Any,
    ) -> None:
        """`file`, `options`: as for `av.open`. `name`: for errors, so without passwords.

        Raises VideoUnreadable (`refused` says what it means that it does not open; or there is no
        video in it), MissingExtraError.
        """
        av = _av()
        self.name = name
        try:
            self._container = av.open(file, **options)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoUnreadable(f"{refused} ({_reason_of(error)})", where=name) from error
        try:
            self._stream = _track_of(self._container, name)
        except BaseException:
            self._container.close()
            raise
        self._start_s: float | None = None

    def close(self) -> None:
        """Twice does no harm."""
        self._container.close()

    @property
    def duration_s(self) -> float | None:
        """Of the track, as the file announces it; None where it does not."""
        stream, container = self._stream, self._container
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        is_matroska = "matroska" in container.format.name
        # Matroska announces when it ends, which counts from 0 even if it begins later.
        begin_s = float((stream.start_time or 0) * stream.time_base) if is_matroska else 0.0
        tag = _MATROSKA_DURATION.match(stream.metadata.get("DURATION", ""))
        if tag is not None:
            return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) - begin_s
        if container.duration is None or len(container.streams) > 1:  # sound may be longer
            return None
        return float(container.duration) / float(_av().time_base) - begin_s

    def _length_s(self, shown: Any) -> float:
        """Of a frame or a packet of one."""
        length_s = float((shown.duration or 0) * (shown.time_base or 0))
        return length_s or 1 / (float(self._stream.average_rate or 0) or _RAW_FPS)

    @property
    def epsilon_s(self) -> float:
        """How much before its time a frame counts as shown."""
        in_milliseconds = self._stream.time_base == Fraction(1, 1000)
        return MILLISECONDS_EPSILON_S if in_milliseconds else EPSILON_S

    def decoded(self) -> Iterator[TimedFrame]:
        """Every frame from here on. Raises VideoUnreadable where the video is broken."""
        end_s = 0.0
        try:
            for picture in self._container.decode(self._stream):
                time_s = end_s  # of a raw stream, which has no times
                if picture.time is not None:
                    if self._start_s is None:
                        self._start_s = float(picture.time)
                    time_s = float(picture.time) - self._start_s
                end_s = time_s + self._length_s(picture)
                yield TimedFrame(time_s, end_s, picture, self.name)
        except (_av().FFmpegError, OSError, ValueError) as error:
            raise VideoUnreadable(
                f"the video is broken or cut off after {end_s:.1f} s ({_reason_of(error)})",
                where=self.name,
            ) from error

    def frames(self) -> Iterator[TimedFrame]:
        """Every frame of the file. Raises VideoUnreadable where it is broken or cut off, VideoEmpty
        when it holds no frame."""
        end_s: float | None = None
        for frame in self.decoded():
            end_s = frame.end_s
            yield frame
        self.require_whole(end_s)

    def require_whole(self, end_s: float | None) -> None:
        """Raises VideoUnreadable if the last frame's end is clearly before the announced one,
        VideoEmpty if there was no frame (None)."""
        if end_s is None:
            raise VideoEmpty("there is no frame in it", where=self.name)
        announced_s = self.duration_s
        if announced_s is not None and end_s < (1 - _CUT_OFF_SHARE) * announced_s - _CUT_OFF_S:
            raise VideoUnreadable(
                f"the video is cut off: it ends after {end_s:.1f} of {announced_s:.1f} s",
                where=self.name,
            )

    def seek(self, time_s: float) -> None:
        """`decoded` then begins with the keyframe at `time_s`, or one before. Only after a first
        frame has been decoded."""
        place = round((time_s + (self._start_s or 0.0)) / self._stream.time_base)
        self._container.seek(place, stream=self._stream, backward=True)

    def packets(self) -> Iterator[tuple[float | None, float, bool]]:
        """Of each frame, in the file's order and undecoded: its time on the file's own clock (None
        in a raw stream), its length, and whether decoding can begin with it. Raises as `decoded`.
        """
        try:
            for packet in self._container.demux(self._stream):
                if packet.size and not packet.is_discard:
                    time_s = None if packet.pts is None else float(packet.pts * packet.time_base)
                    yield time_s, self._length_s(packet), bool(packet.is_keyframe)
        except (_av().FFmpegError, OSError, ValueError) as error:
            raise VideoUnreadable(
                f"the video is broken ({_reason_of(error)})", where=self.name
            ) from error


def _track_of(container: Any, name: str) -> Any:
    """The video stream that is watched."""
    if set(container.format.name.split(",")) & TEXT_FORMATS:
        raise VideoUnreadable("not a video but text", where=name)
    if not container.streams.video:
        raise VideoUnreadable("there is no video in it", where=name)
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoUnreadable("nothing here decodes the video in it", where=name)
    return stream


def _reason_of(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)  # without the URL, which has the password


def open_video(path: Path) -> Video:
    """A file. Raises VideoNotFound, VideoUnreadable, MissingExtraError."""
    if not path.exists():
        raise VideoNotFound("no such file", where=path)
    video = Video(str(path), str(path))
    video._stream.thread_type = "AUTO"
    return video


def due_frames(
    frames: Iterable[TimedFrame], fps: float, epsilon_s: float = EPSILON_S
) -> Iterator[tuple[float, TimedFrame]]:
    """What is on screen at 0, 1/fps, 2/fps ... seconds, with the first such time; each frame once.

    `epsilon_s`: the video's. What `frames` raises as VideoError comes after the last frame that
    could be decoded.
    """

    def ticks_before(time_s: float) -> int:
        """How many of these times show what was on screen before a frame that comes then."""
        return max(0, math.ceil((time_s - epsilon_s) * fps))

    tick = 0
    shown: TimedFrame | None = None
    broken: VideoError | None = None
    try:
        for following in frames:
            if shown is not None:
                until = ticks_before(following.time_s)
                if until > tick:
                    yield tick / fps, shown
                    tick = until
            shown = following
    except VideoError as error:
        broken = error
    if shown is not None:
        until = ticks_before(max(shown.end_s, shown.time_s + 2 * epsilon_s))
        if until > tick:
            yield tick / fps, shown
    if broken is not None:
        raise broken


def read_video(path: Path, fps: float) -> Iterator[tuple[float, Rgb]]:
    """`due_frames` of a file: seconds from the first frame, rgb.

    Raises VideoNotFound, VideoUnreadable (also at the end of a file that is cut off), VideoEmpty,
    MissingExtraError.
    """
    with closing(open_video(path)) as video:
        for time_s, frame in due_frames(video.frames(), fps, video.epsilon_s):
            yield time_s, frame.rgb()


@dataclass(frozen=True, eq=False)
class VideoTimes:
    """When the frames of a file are shown, from its packets alone: nothing is decoded."""

    starts_s: npt.NDArray[np.float64]
    """Ascending, from 0."""
    keys_s: tuple[float, ...]
    """Ascending times of the frames from which decoding can begin; none if the file has no times of
    its own."""
    epsilon_s: float
    """The video's."""

    @property
    def end_s(self) -> float:
        """When the last frame begins."""
        return float(self.starts_s[-1])

    @property
    def frame_s(self) -> float:
        """Mean distance of two frames; 0 for a single one."""
        return self.end_s / max(len(self.starts_s) - 1, 1)

    def each_frame_once(self, times_s: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which of these ascending times show another frame than the time before."""
        shown = np.searchsorted(self.starts_s, times_s + self.epsilon_s, side="right")
        return np.diff(shown, prepend=-1) > 0


@functools.lru_cache(maxsize=4096)
def probe_video(path: Path) -> VideoTimes:
    """Reads the times of all frames of a file.

    Raises VideoNotFound, VideoUnreadable (not a video, or cut off), VideoEmpty, MissingExtraError.
    """
    starts: list[float] = []
    keys: list[float] = []
    end_s = 0.0
    with closing(open_video(path)) as video:
        for time_s, length_s, is_key in video.packets():
            starts.append(end_s if time_s is None else time_s)
            end_s = starts[-1] + length_s
            if is_key and time_s is not None:
                keys.append(time_s)
        starts.sort()
        video.require_whole(max(end_s, starts[-1]) - starts[0] if starts else None)
        keys_s = tuple(sorted(key - starts[0] for key in keys))
        return VideoTimes(np.array(starts) - starts[0], keys_s, video.epsilon_s)


def read_moments(path: Path, times_s: Sequence[float]) -> Iterator[Rgb]:
    """What is on screen at each of these ascending times (seconds from the first frame), rgb.

    A time after the last frame shows the last one; if the file breaks off clearly before a time
    that its packets promise, that is VideoUnreadable. Stretches between far moments are jumped over
    where the file allows it. Raises as `probe_video`, too.
    """
    probed = probe_video(path)
    wanted = list(times_s)
    served = 0
    try:
        for rgb in _moments(path, probed, wanted, probed.keys_s):
            yield rgb
            served += 1
    except _LostJump:  # its index is wrong: every frame is decoded
        yield from _moments(path, probed, wanted[served:], ())


class _LostJump(Exception):
    """A jump did not land where the file's keyframes promised."""


def _moments(
    path: Path, probed: VideoTimes, wanted: list[float], keys_s: Sequence[float]
) -> Iterator[Rgb]:
    """As `read_moments`; jumps to `keys_s` only."""
    served = 0
    shown: TimedFrame | None = None
    jumped = False
    with closing(open_video(path)) as video:
        frames = video.decoded()
        while (following := next(frames, None)) is not None:
            if jumped and following.time_s > wanted[served] + probed.epsilon_s:
                raise _LostJump
            jumped = False
            while shown is not None and wanted[served] < following.time_s - probed.epsilon_s:
                yield shown.rgb()
                served += 1
                if served == len(wanted):
                    return
            shown = following
            nearest = bisect.bisect_right(keys_s, wanted[served] + probed.epsilon_s) - 1
            if nearest >= 0 and keys_s[nearest] > shown.time_s + _JUMP_S:
                video.seek(keys_s[nearest])
                frames = video.decoded()
                jumped = True
    if jumped:
        raise _LostJump
    for time_s in wanted[served:]:
        shown_s = -math.inf if shown is None else shown.time_s
        if shown is None or min(time_s, probed.end_s) > shown_s + probed.frame_s + _LOST_S:
            raise VideoUnreadable(
                f"the video is broken or cut off after {max(shown_s, 0.0):.1f} s", where=path
            )
        yield shown.rgb()


def write_video(path: Path, frames: Rgb, fps: float) -> None:
    """Writes u8 [T, H, W, 3] as H.264 at `fps` (a whole number). Raises MissingExtraError."""
    av = _av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError.for_library("av", "client") from error
    return av
