"""At which times of a video its frames are taken: Molmo2's rule `uniform_last_frame`.

arXiv 2601.10611, section 3 and the published code: so many pictures a second from the start, and
the last one exactly; a video too long for that gives `max_frames` equally spaced ones, both ends
included.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Published: 2 fps; 64 frames in STTS, 128 in Molmo2's fine-tuning, 384 for long context."""

    fps: float = 2.0
    max_frames: int = 64

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, got {self.max_frames}")

    def times(self, end_s: float, frame_s: float = 0.0) -> npt.NDArray[np.float64]:
        """Ascending times from 0 to `end_s`, when the last frame is shown; all in seconds.

        `frame_s` is the distance of two frames: times nearer to the end than half of it would
        show the last frame twice. Raises ValueError for a negative end.
        """
        if end_s < 0:
            raise ValueError(f"end_s = {end_s}: must not be negative")
        if self.max_frames == 1:
            return np.zeros(1)
        if (self.max_frames - 1) / self.fps < end_s:
            return np.linspace(0.0, end_s, self.max_frames)
        nearest = max(frame_s / 2, 1e-6)
        grid = np.arange(0.0, max(end_s - nearest, 0.0), 1 / self.fps)
        if not len(grid):
            return np.zeros(1) if end_s <= nearest else np.array([0.0, end_s])
        return np.append(grid, end_s)
