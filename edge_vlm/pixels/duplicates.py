"""Pictures that look like the last one that was encoded: a static scene costs almost nothing."""

from __future__ import annotations

import numpy as np

THUMBNAIL = 32
"""Side of what is compared, see `edge_vlm.pixels.frames.thumbnail`."""


class DuplicateFilter:
    """Compares each picture with the last one that was encoded."""

    def __init__(self) -> None:
        self._encoded: tuple[np.ndarray, int] | None = None

    def is_duplicate(
        self, small: np.ndarray, capture_us: int, threshold: float, heartbeat_s: float
    ) -> bool:
        """`small`: thumbnail f32 [side, side]; `threshold`: largest change of a point that still is
        the same picture; after `heartbeat_s` none is."""
        if self._encoded is None:
            return False
        thumb, since_us = self._encoded
        fresh = capture_us - since_us < heartbeat_s * 1e6
        return fresh and bool(np.abs(small - thumb).max() <= threshold)

    def on_encoded(self, small: np.ndarray, capture_us: int) -> None:
        self._encoded = (small, capture_us)

    def reset(self) -> None:
        """The last picture was lost: whatever comes next is new."""
        self._encoded = None
