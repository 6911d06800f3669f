"""Stream time: what a capture time is on the wire, and what the model sees of it."""

from __future__ import annotations


class StreamClock:
    """The one owner of a stream's origin and of the offset that the model sees.

    Everything on the wire counts from the first frame of the session that could be decoded. The
    model's time stamps begin anew with the memory, and whenever they reach what it was trained for.
    """

    def __init__(self, origin_us: int | None = None) -> None:
        self._origin_us = origin_us
        self.offset_s = 0.0
        """The model sees stream time minus this."""

    def pts_ns(self, capture_us: int) -> int:
        """Stream time of a capture time; the first one that is asked for is the origin."""
        if self._origin_us is None:
            self._origin_us = capture_us
        return (capture_us - self._origin_us) * 1000

    def stamp_s(self, pts_ns: int) -> float:
        """The time stamp that the model sees."""
        return max(pts_ns * 1e-9 - self.offset_s, 0.0)
