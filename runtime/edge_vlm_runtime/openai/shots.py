"""The frames of one request, one after the other. Blocks; not for an event loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from edge_vlm.errors import FrameDecodeError, QuestionTooLong, VideoError
from edge_vlm.errors.requests import MediaRefused, RequestError
from edge_vlm.pixels.frames import decode_picture, raw_frame
from edge_vlm.pixels.video import open_video, read_moments
from edge_vlm_runtime.openai.chat_request import ChatRequest
from edge_vlm_runtime.openai.content import Media
from edge_vlm_runtime.openai.media import MediaRules, read_picture, video_file

MOST_MOMENTS = 1 << 20
"""Of a video, however long it says it is."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A frame of a request."""

    data: bytes
    """As `raw_frame` makes it."""
    time_s: float
    param: str
    """Where what it is from stands in the request."""


def shots_of(request: ChatRequest, rules: MediaRules, *, fps: float, most: int) -> Iterator[Shot]:
    """All of them. `fps`: of pictures without times, and of a video unless the request says it;
    `most`: so many of a video fit.

    All pictures are looked at before the first is handed out. Raises MediaRefused, RequestError.
    """
    media = request.conversation.media
    if media and media[0].kind == "video":
        yield from _video(media[0], request, rules, fps=fps, most=most)
        return
    times = _times(media, request.frame_times, fps)
    pictures = [read_picture(each, rules) for each in media]
    for each, data, time_s in zip(media, pictures, times, strict=True):
        yield Shot(data=_decoded(data, each), time_s=time_s, param=each.param)


def _decoded(data: bytes, media: Media) -> bytes:
    """Here and not on the engines' thread, where live streams would wait for it."""
    try:
        return raw_frame(decode_picture(data))
    except FrameDecodeError as error:
        raise MediaRefused(str(error), param=media.param) from error


def _times(media: Sequence[Media], given: Sequence[float], fps: float) -> list[float]:
    """Raises RequestError when they do not rise."""
    if given:
        return list(given)
    stamps = [each.time_s for each in media]
    if any(stamp is None for stamp in stamps):  # of several messages, say
        return [number / fps for number in range(len(media))]
    times = [stamp or 0.0 for stamp in stamps]
    for number, (earlier, later) in enumerate(itertools.pairwise(times), 1):
        if later <= earlier:
            raise RequestError(
                f"the times of the pictures must rise: {later:g} s comes after {earlier:g} s",
                param=media[number].param,
            )
    return times


def _video(
    media: Media, request: ChatRequest, rules: MediaRules, *, fps: float, most: int
) -> Iterator[Shot]:
    with video_file(media, rules) as path:
        try:
            with closing(open_video(path, name="the video", is_foreign=True)) as video:
                times = video.times()
            wanted = _moments(times.end_s, request, fps, most)
            shown = times.each_frame_once(wanted)
            moments = [float(moment) for moment in wanted[shown]]
            pictures = read_moments(path, moments, foreign=times)
            for time_s, rgb in zip(moments, pictures, strict=True):
                yield Shot(data=raw_frame(rgb), time_s=time_s, param=media.param)
        except VideoError as error:
            raise MediaRefused(
                f"the video cannot be read: {error.what}", param=media.param
            ) from error


def _moments(end_s: float, request: ChatRequest, fps: float, most: int) -> np.ndarray:
    """Seconds, ascending: at the wanted rate if so many fit, else evenly over the whole."""
    if request.num_frames is not None:
        return np.linspace(0.0, end_s, request.num_frames)
    rate = request.fps or fps
    number = math.floor((end_s + 1e-6) * rate) + 1
    if number > MOST_MOMENTS and request.fps is not None:
        raise QuestionTooLong(
            f"{number} frames of the video are wanted", remedy=f"{MOST_MOMENTS} are looked at"
        )
    if number <= most or request.fps is not None:
        return np.arange(number) / rate
    return np.linspace(0.0, end_s, most)
