"""At which times of a whole clip its frames are taken: Molmo2's rule `uniform_last_frame`.

arXiv 2601.10611, section 3 and the published code: so many pictures a second from the start, and
the last one exactly; a video too long for that gives `num_frames` equally spaced ones, both ends
included. Training, evaluation and `ask` take this one; a live stream has no end to take it from.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from edge_vlm.config import MOST_FPS, require_numbers

UNIFORM_LAST_FRAME = "uniform_last_frame"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameRule:
    """Which frames of a whole clip a model was trained on; the defaults are Molmo2's.

    Published: 64 frames in STTS, 128 in Molmo2's fine-tuning, 384 for long context.
    """

    num_frames: int = 384
    """Most frames of a clip (`num_frames`, `max_frames`)."""
    max_fps: float = 2.0
    """Frames per second of a clip that is short enough."""
    mode: str = UNIFORM_LAST_FRAME
    """`frame_sample_mode`: `uniform_last_frame` takes the last frame in any case, and past
    `num_frames` spreads evenly over the whole clip."""

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.num_frames < 1:
            raise ValueError(f"FrameRule.num_frames = {self.num_frames!r}: must be positive")
        if not 0 < self.max_fps <= MOST_FPS:
            raise ValueError(f"FrameRule.max_fps = {self.max_fps!r}: must be in (0, {MOST_FPS:g}]")
        if self.mode != UNIFORM_LAST_FRAME:
            raise ValueError(
                f"FrameRule.mode = {self.mode!r}: only {UNIFORM_LAST_FRAME!r} is known"
            )

    def times(self, end_s: float, frame_s: float = 0.0) -> npt.NDArray[np.float64]:
        """Ascending times from 0 to `end_s`, when the last frame is shown; all in seconds.

        `frame_s` is the distance of two frames: times nearer to the end than half of it would
        show the last frame twice. Raises ValueError for a negative end.
        """
        if end_s < 0:
            raise ValueError(f"end_s = {end_s}: must not be negative")
        if self.num_frames == 1:
            return np.zeros(1)
        if self.spreads(end_s):
            return np.linspace(0.0, end_s, self.num_frames)
        nearest = max(frame_s / 2, 1e-6)
        grid = np.arange(0.0, max(end_s - nearest, 0.0), 1 / self.max_fps)
        if not len(grid):
            return np.zeros(1) if end_s <= nearest else np.array([0.0, end_s])
        return np.append(grid, end_s)

    def spreads(self, end_s: float) -> bool:
        """Whether a clip is too long for `max_fps`, so that its frames are equally spaced."""
        return (self.num_frames - 1) / self.max_fps < end_s
