"""The pictures of a video file, thinned to the wanted rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import (
    VideoEmpty,
    VideoNotFound,
    VideoUnreadable,
)
from edge_vlm_runtime.sources.container import (
    TICKS_PER_S,
    FFmpegError,
    Picture,
    open_container,
    reason_of,
    to_rgb,
    video_stream,
)

EPSILON_S = 1e-4
CUT_OFF_TOLERANCE_S = 0.5


class FileSource:
    """The pictures a player would show at 0, 1/fps, 2/fps ... seconds."""

    is_live = False

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._fps = fps
        self._closed = False
        if not self.path.exists():
            raise VideoNotFound("no such file", where=self.path)
        self._container = open_container(str(self.path), self.name)
        self._stream = video_stream(self._container, self.name)

    @property
    def duration_s(self) -> float | None:
        """As the file announces it."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return None if container.duration is None else container.duration / TICKS_PER_S

    def pictures(self) -> Iterator[Picture]:
        for time_s, frame in due_frames(self._decoded(), self._fps):
            yield Picture(rgb=to_rgb(frame, self.name), time_s=time_s)

    def _decoded(self) -> Iterator[TimedFrame]:
        """Every frame of the file. Raises VideoUnreadable where the file is broken or cut off."""
        start_s: float | None = None
        end_s = 0.0
        try:
            for frame in self._container.decode(self._stream):
                if self._closed:
                    return
                at_s = end_s if frame.time is None else float(frame.time)
                start_s = at_s if start_s is None else start_s
                length_s = float((frame.duration or 0) * (frame.time_base or 0))
                end_s = at_s - start_s + length_s
                yield TimedFrame(at_s - start_s, end_s, frame)
        except FFmpegError as error:
            raise VideoUnreadable(
                f"the file is broken or cut off after {end_s:.1f} s ({reason_of(error)})",
                where=self.path,
            ) from error
        if start_s is None:
            raise VideoEmpty("the file holds no frame", where=self.path)
        announced_s = self.duration_s
        if announced_s is not None and end_s < 0.9 * announced_s - CUT_OFF_TOLERANCE_S:
            raise VideoUnreadable(
                f"the file is cut off: it ends after {end_s:.1f} of {announced_s:.1f} s",
                where=self.path,
            )

    def close(self) -> None:
        self._closed = True


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame and when a player would show it."""

    start_s: float
    end_s: float
    frame: Any


def due_frames(frames: Iterable[TimedFrame], fps: float) -> Iterator[tuple[float, Any]]:
    """What is on screen at 0, 1/fps, 2/fps ... seconds, each frame once at most."""
    tick = 0
    shown: TimedFrame | None = None

    def ticks_until(end_s: float) -> Iterator[float]:
        nonlocal tick
        while tick / fps < end_s - EPSILON_S:
            yield tick / fps
            tick += 1

    for following in frames:
        if shown is not None:
            due = list(ticks_until(following.start_s))
            if due:
                yield due[0], shown.frame
        shown = following
    if shown is not None:
        due = list(ticks_until(max(shown.end_s, shown.start_s + 2 * EPSILON_S)))
        if due:
            yield due[0], shown.frame
