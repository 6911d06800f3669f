"""Answers whose times count from the begin of the stream, whatever the model counted from.

A model sees time stamps that begin anew when they reach what it was trained for, and names those.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_vlm.text.points import move_points
from edge_vlm.text.times import move_times
from edge_vlm_runtime.session.context import ShownFrame


def in_stream_time(text: str, frames: Sequence[ShownFrame]) -> str | None:
    """The text of an answer to what was shown, its times and points in seconds since the first
    frame of the stream; None where they are already. Never raises."""
    if all(frame.stamp_s == frame.capture_s for frame in frames):
        return None

    def moved(time_s: float) -> float:
        """The first frame of the stream keeps its stamp 0, all others are moved."""
        nearest = min(frames, key=lambda frame: abs(frame.stamp_s - time_s))
        return max(time_s - nearest.stamp_s + nearest.capture_s, 0.0)

    return move_points(move_times(text, moved), moved)
