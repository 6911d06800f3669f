"""Where an answer points, on which frame and when."""

from __future__ import annotations

from collections.abc import Sequence

from edge_vlm.text.points import Point, parse_points
from edge_vlm_runtime import protocol
from edge_vlm_runtime.session.context import ShownFrame

NEAR_S = 0.5
"""A time further than this from every frame that was shown belongs to none of them."""


def pointed_at(
    text: str, frames: Sequence[ShownFrame], snapshot: protocol.Snapshot | None
) -> tuple[protocol.PointedAt, ...]:
    """The points and tracks in an answer's text, with capture times.

    `frames` were shown as video, `snapshot` as a picture. Pictures are numbered and frames go by
    their stamps; a snapshot alone is meant whatever the model writes. Never raises.
    """
    return tuple(_place(point, frames, snapshot) for point in parse_points(text))


def _place(
    point: Point, frames: Sequence[ShownFrame], snapshot: protocol.Snapshot | None
) -> protocol.PointedAt:
    sequence: int | None = None
    time_s = point.at
    if snapshot is not None and not (frames and point.is_time):
        sequence, time_s = snapshot.frame_sequence, snapshot.time_s
    elif frames:
        nearest = min(frames, key=lambda frame: abs(frame.stamp_s - point.at))
        # What the model calls a time is counted from where its stamps begin.
        time_s = point.at - nearest.stamp_s + nearest.capture_s
        if abs(nearest.stamp_s - point.at) <= NEAR_S:
            sequence, time_s = nearest.seq, nearest.capture_s
    return protocol.PointedAt(
        kind="track" if point.kind == "tracks" else "point",
        label=point.label,
        object_id=point.object_id,
        x=point.x,
        y=point.y,
        time_s=time_s,
        frame_sequence=sequence,
    )
