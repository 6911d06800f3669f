"""The pictures of a video file, thinned to the wanted rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile
from pathlib import Path

from edge_vlm.pixels.video import due_frames, open_video
from edge_vlm_runtime.sources.container import Picture


class FileSource:
    """The pictures a player would show at 0, 1/fps, 2/fps ... seconds."""

    is_live = False

    def __init__(self, path: str | Path, fps: float) -> None:
        """Raises VideoNotFound, VideoUnreadable."""
        self.name = str(path)
        self._fps = fps
        self._closed = False
        self._video = open_video(Path(path))

    @property
    def duration_s(self) -> float | None:
        """As the file announces it."""
        return self._video.duration_s

    def pictures(self) -> Iterator[Picture]:
        """Once. Raises VideoUnreadable where the file is broken or cut off, VideoEmpty."""
        frames = takewhile(lambda _: not self._closed, self._video.frames())
        with closing(self._video):
            for time_s, frame in due_frames(frames, self._fps, self._video.epsilon_s):
                if self._closed:
                    return
                yield Picture(rgb=frame.rgb(), time_s=time_s)

    def close(self) -> None:
        self._closed = True
