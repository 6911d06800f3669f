"""Footage to look at: a video file or a question-set folder as consecutive frames."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from edge_vlm.errors import VideoEmpty, VideoNotFound
from edge_vlm.formats.qa_set import read_question_set
from edge_vlm.pixels.frames import Rgb, decode_jpeg
from edge_vlm.pixels.video import read_video

Shot = tuple[bool, Rgb]
"""Whether the frame starts a clip, and its rgb u8 [H, W, 3]."""


def read_footage(path: Path, fps: float, max_frames: int) -> Iterator[Shot]:
    """The first `max_frames` frames: a video's at `fps`, a question set's at its own times.

    Raises VideoNotFound, VideoUnreadable (not a video, or broken before that many frames),
    VideoEmpty, and what `read_question_set` and `decode_jpeg` raise.
    """
    if not path.exists():
        raise VideoNotFound("no such file or folder", where=path)
    frames = _question_set_frames(path) if path.is_dir() else _video_frames(path, fps)
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


def _video_frames(path: Path, fps: float) -> Iterator[Shot]:
    for i, (_, rgb) in enumerate(read_video(path, fps)):
        yield i == 0, rgb
