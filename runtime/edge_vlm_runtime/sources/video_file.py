"""The pictures of a video file: thinned to the wanted rate, or at moments of a whole clip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path

from edge_vlm.pixels.video import Video, due_frames, open_video, read_moments
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


class ClipSource:
    """What is on screen at certain moments of a file that may be read more than once."""

    is_live = False

    def __init__(self, path: Path, times_s: Sequence[float]) -> None:
        """`times_s`: ascending, from the first frame."""
        self.name = str(path)
        self.max_side: int | None = None
        self.counts: Counter[str] = Counter()
        self.times_s = times_s
        self._path = path
        self._closed = False

    def pictures(self) -> Iterator[Picture]:
        """Once. Raises as `read_moments`."""
        moments = read_moments(self._path, self.times_s, max_side=self.max_side, counts=self.counts)
        for time_s, rgb in zip(self.times_s, moments, strict=True):
            if self._closed:
                return
            yield Picture(rgb=rgb, time_s=time_s)

    def close(self) -> None:
        self._closed = True
