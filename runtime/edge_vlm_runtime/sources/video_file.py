"""The pictures of a video file, thinned to the wanted rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile
from pathlib import Path

from edge_vlm.pixels.video import Video, due_frames, open_video
from edge_vlm_runtime.sources.container import Picture


class FileSource:
    """The pictures a player would show at 0, 1/fps, 2/fps ... seconds."""

    is_live = False

    def __init__(self, file: str | Path | Video, fps: float) -> None:
        """A path, or what has been opened already. Raises VideoNotFound, VideoUnreadable."""
        self._fps = fps
        self._closed = False
        self.max_side: int | None = None
        self._video = file if isinstance(file, Video) else open_video(Path(file))
        self.name = self._video.name

    @property
    def duration_s(self) -> float | None:
        """As the file announces it."""
        return self._video.duration_s

    @property
    def counts(self) -> Counter[str]:
        return self._video.counts

    def pictures(self) -> Iterator[Picture]:
        """Once. Raises VideoUnreadable where the file is broken or cut off, VideoEmpty."""
        frames = takewhile(lambda _: not self._closed, self._video.frames())
        with closing(self._video):
            for time_s, frame in due_frames(frames, self._fps, self._video.epsilon_s):
                if self._closed:
                    return
                yield Picture(rgb=frame.rgb(self.max_side), time_s=time_s)

    def close(self) -> None:
        self._closed = True
