"""Moving pictures: what a player shows, and when. Every stage reads video here and nowhere else.

`Video` (of `reading`) gives `TimedFrame`s; `due_frames` and `read_moments`
choose among them by one rule: a frame is on screen from its own time until the next one's. A stream
is shown at a rate (`read_video`), a whole clip as a model was trained on it (`read_clip`). Times
are the file's own, in seconds from its first frame. rgb is always u8 [H, W, 3], upright.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_vlm.config import MOST_FPS
from edge_vlm.errors import ConfigError, VideoError, VideoUnreadable
from edge_vlm.pixels.colour import AVCOL_SPC_SMPTE170M, is_hd
from edge_vlm.pixels.film.opening import av
from edge_vlm.pixels.film.reading import EPSILON_S as EPSILON_S
from edge_vlm.pixels.film.reading import TimedFrame as TimedFrame
from edge_vlm.pixels.film.reading import Video as Video
from edge_vlm.pixels.film.reading import VideoTimes as VideoTimes
from edge_vlm.pixels.film.reading import open_video as open_video
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pixels.sampling import FrameRule

_JUMP_S = 1.0
"""A keyframe nearer than this is reached by decoding on."""
_LOST_S = 0.25
"""How much of what the packets promise may be missing at the end, beyond one frame."""


def due_frames(
    frames: Iterable[TimedFrame], fps: float, epsilon_s: float = EPSILON_S
) -> Iterator[tuple[float, TimedFrame]]:
    """What is on screen at 0, 1/fps, 2/fps ... seconds, with the first such time; each frame once.

    `epsilon_s`: the video's. What `frames` raises as VideoError comes after the last frame that
    could be decoded. Raises ConfigError for an `fps` that no video has.
    """

    if not 0 < fps <= MOST_FPS:
        raise ConfigError(f"fps must be in (0, {MOST_FPS:g}], got {fps!r}")

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


def read_video(path: str | Path, fps: float) -> Iterator[tuple[float, Rgb]]:
    """`due_frames` of a file: seconds from the first frame, rgb.

    Raises VideoNotFound, VideoUnreadable (also at the end of a file that is cut off), VideoEmpty,
    MissingExtraError.
    """
    with closing(open_video(Path(path))) as video:
        for time_s, frame in due_frames(video.frames(), fps, video.epsilon_s):
            yield time_s, frame.rgb()


@functools.lru_cache(maxsize=4096)
def probe_video(path: Path) -> VideoTimes:
    """Reads the times of all frames of a file.

    Raises VideoNotFound, VideoUnreadable (not a video, or cut off), VideoEmpty, MissingExtraError.
    """
    with closing(open_video(path)) as video:
        return video.times()


def clip_times(
    probed: VideoTimes, rule: FrameRule, start_s: float = 0.0, end_s: float | None = None
) -> npt.NDArray[np.float64]:
    """Of the frames that the rule takes of a stretch, in seconds from its start; each frame once.

    `end_s`: from the file's first frame; None: when the last one is shown.
    """
    end_s = probed.end_s if end_s is None else min(end_s, probed.end_s)
    times_s = rule.times(max(end_s - start_s, 0.0), probed.frame_s)
    return times_s[probed.each_frame_once(start_s + times_s)]


def read_clip(path: Path, rule: FrameRule) -> Iterator[tuple[float, Rgb]]:
    """The frames that the rule takes of a file: seconds from the first frame, rgb.

    Raises as `read_moments`.
    """
    times_s = clip_times(probe_video(path), rule).tolist()
    yield from zip(times_s, read_moments(path, times_s), strict=True)


def read_moments(
    path: Path,
    times_s: Sequence[float],
    *,
    max_side: int | None = None,
    counts: Counter[str] | None = None,
    foreign: VideoTimes | None = None,
) -> Iterator[Rgb]:
    """What is on screen at each of these ascending times (seconds from the first frame), rgb, its
    longer side at most `max_side`.

    A time after the last frame shows the last one; if the file breaks off clearly before a time
    that its packets promise, that is VideoUnreadable. Stretches between far moments are jumped over
    where the file allows it. What was odd is added to `counts`, as `Video.counts`. `foreign`: the
    times of a stranger's file, which is opened and probed as such, and only once. Raises as
    `probe_video`, too.
    """
    probed = probe_video(path) if foreign is None else foreign
    is_foreign = foreign is not None
    wanted = list(times_s)
    served = 0
    try:
        for shown in _moments(path, probed, wanted, probed.keys_s, counts, is_foreign):
            yield shown.rgb(max_side)
            served += 1
    except _LostJump:  # its index is wrong: every frame is decoded
        for shown in _moments(path, probed, wanted[served:], (), counts, is_foreign):
            yield shown.rgb(max_side)


class _LostJump(Exception):
    """A jump did not land where the file's keyframes promised."""


def _moments(
    path: Path,
    probed: VideoTimes,
    wanted: list[float],
    keys_s: Sequence[float],
    counts: Counter[str] | None,
    is_foreign: bool,
) -> Iterator[TimedFrame]:
    """As `read_moments`; jumps to `keys_s` only."""
    served = 0
    shown: TimedFrame | None = None
    jumped_to: float | None = None
    with closing(open_video(path, is_foreign=is_foreign)) as video:
        video.is_heard = False  # `probe_video` was
        if counts is not None:
            video.counts = counts
        frames = video.decoded()
        while (following := next(frames, None)) is not None:
            if jumped_to is not None:
                if following.time_s > wanted[served] + probed.epsilon_s:
                    raise _LostJump
                if following.time_s < jumped_to - _JUMP_S:  # it would be jumped to for ever
                    raise _LostJump
            jumped_to = None
            while shown is not None and wanted[served] < following.time_s - probed.epsilon_s:
                yield shown
                served += 1
                if served == len(wanted):
                    return
            shown = following
            nearest = bisect.bisect_right(keys_s, wanted[served] + probed.epsilon_s) - 1
            if nearest >= 0 and keys_s[nearest] > shown.time_s + _JUMP_S:
                video.seek(keys_s[nearest])
                frames = video.decoded()
                jumped_to = keys_s[nearest]
    if jumped_to is not None:
        raise _LostJump
    for time_s in wanted[served:]:
        shown_s = -math.inf if shown is None else shown.time_s
        if shown is None or min(time_s, probed.end_s) > shown_s + probed.frame_s + _LOST_S:
            raise VideoUnreadable(
                f"the video is broken or cut off after {max(shown_s, 0.0):.1f} s", where=path
            )
        yield shown


def write_video(path: Path, frames: Rgb, fps: float) -> None:
    """Writes u8 [T, H, W, 3] as H.264 at `fps` (a whole number). Raises MissingExtraError."""
    library = av()
    with library.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        if is_hd(stream.width, stream.height):  # where another matrix is the rule
            stream.codec_context.colorspace = AVCOL_SPC_SMPTE170M
        for picture in frames:
            container.mux(stream.encode(library.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
