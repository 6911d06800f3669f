"""Footage: a video file or a question-set folder as consecutive frames."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from edge_vlm.errors import MissingExtraError, VideoEmpty, VideoNotFound, VideoUnreadable
from edge_vlm.formats.qa_set import read_question_set
from edge_vlm.pixels.frames import decode_jpeg

Shot = tuple[bool, np.ndarray]
"""Whether the frame starts a clip, and its rgb u8 [H, W, 3]."""

TEXT_FORMATS = {"tty", "bin", "idf", "adf", "xbin"}
"""Demuxers that render any text as moving pictures."""


def read_footage(path: Path, fps: float, max_frames: int) -> Iterator[Shot]:
    """The first `max_frames` frames: a video's at `fps`, a question set's at its own times.

    Raises VideoNotFound, VideoUnreadable (not a video, or broken before that many frames),
    VideoEmpty, and what `read_question_set` and `decode_jpeg` raise.
    """
    if not path.exists():
        raise VideoNotFound("no such file or folder", where=path)
    frames = _question_set_frames(path) if path.is_dir() else _video_shots(path, fps)
    seen = False
    for shot in islice(frames, max_frames):
        seen = True
        yield shot
    if not seen:
        raise VideoEmpty("there is no frame in it", where=path)


def _question_set_frames(folder: Path) -> Iterator[Shot]:
    for clip in read_question_set(folder):
        for i, jpeg in enumerate(clip.jpegs):
            yield i == 0, decode_jpeg(jpeg)


def _video_shots(path: Path, fps: float) -> Iterator[Shot]:
    for i, (_, rgb) in enumerate(read_video(path, fps)):
        yield i == 0, rgb


def read_video(path: Path, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """A video's frames at `fps`: seconds from the first one, rgb u8 [H, W, 3].

    Raises VideoNotFound, VideoUnreadable, MissingExtraError.
    """
    if not path.exists():
        raise VideoNotFound("no such file", where=path)
    try:
        import av
    except ImportError as error:
        raise MissingExtraError.for_library("av", "train") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or set(container.format.name.split(",")) & TEXT_FORMATS:
                raise VideoUnreadable("there is no video in it", where=path)
            stream = container.streams.video[0]
            start_s: float | None = None
            tick = 0
            for i, frame in enumerate(container.decode(stream)):
                # Raw streams carry no times.
                time_s = i / float(stream.average_rate or fps) if frame.time is None else frame.time
                start_s = time_s if start_s is None else start_s
                due = int((time_s - start_s) * fps + 1e-3)
                if due >= tick:
                    yield time_s - start_s, frame.to_ndarray(format="rgb24")
                    tick = due + 1
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoUnreadable(f"not a video, or broken ({error})", where=path) from error
