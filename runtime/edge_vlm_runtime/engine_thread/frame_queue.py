"""The bounded hand-over of frames from the socket to the engine thread, with a named drop rule.

Safe to use from two threads. Every frame that is put comes out exactly once: taken, or in the list
of dropped ones.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import DropPolicy
from edge_vlm_runtime.session.frames import DroppedFrame, EncodedFrame, Encoding


class RateGate:
    """Holds a stream of capture times to a mean rate, forgiving a jitter of a quarter interval."""

    JITTER = 0.25

    def __init__(self, fps_cap: float) -> None:
        self.interval_us = 1e6 / fps_cap
        self._due_us: float | None = None

    def lets_through(self, capture_us: int) -> bool:
        slack = self.JITTER * self.interval_us
        if self._due_us is not None and capture_us < self._due_us - slack:
            return False
        due = capture_us if self._due_us is None else self._due_us
        self._due_us = max(due, capture_us - slack) + self.interval_us
        return True


class FrameQueue:
    """One session's frames on their way in.

    LIVE: one place, the newest frame wins. WAIT: `wait_capacity` places, nothing is dropped as long
    as the sender keeps to the announced number of unacknowledged frames.
    """

    def __init__(self, *, delivery: DropPolicy, fps_cap: float, wait_capacity: int) -> None:
        self._lock = threading.Lock()
        self._wait_capacity = wait_capacity
        self._delivery = delivery
        self._gate = RateGate(fps_cap)
        self._waiting: deque[EncodedFrame] = deque()
        self._last_seq: int | None = None
        self._last_capture_us: int | None = None
        self._received = 0
        self._dropped: Counter[str] = Counter()

    def configure(self, *, delivery: DropPolicy, fps_cap: float) -> None:
        """New rules for the frames to come."""
        with self._lock:
            self._delivery = delivery
            if 1e6 / fps_cap != self._gate.interval_us:
                self._gate = RateGate(fps_cap)

    def put(self, frame: EncodedFrame) -> list[DroppedFrame]:
        """Takes the frame in; returns what was dropped for it, or the frame itself."""
        with self._lock:
            self._received += 1
            dropped = self._put(frame)
            self._dropped.update(each.reason.value for each in dropped)
            return dropped

    def _put(self, frame: EncodedFrame) -> list[DroppedFrame]:
        if self._last_seq is not None and frame.seq <= self._last_seq:
            return [DroppedFrame.of(frame, DropReason.STALE)]
        self._last_seq = frame.seq
        if self._last_capture_us is not None and frame.capture_us <= self._last_capture_us:
            return [DroppedFrame.of(frame, DropReason.STALE)]
        if frame.encoding is Encoding.STILL:  # its sender waits for room, see `has_room`
            dropped = []
        elif self._delivery is DropPolicy.LIVE:
            if not self._gate.lets_through(frame.capture_us):
                return [DroppedFrame.of(frame, DropReason.RATE)]
            late = [old for old in self._waiting if old.encoding is not Encoding.STILL]
            dropped = [DroppedFrame.of(old, DropReason.BUSY) for old in late]
            for old in late:
                self._waiting.remove(old)
        elif len(self._waiting) >= self._wait_capacity:
            return [DroppedFrame.of(frame, DropReason.BUSY)]
        else:
            dropped = []
        self._last_capture_us = frame.capture_us
        self._waiting.append(frame)
        return dropped

    @property
    def has_room(self) -> bool:
        """Whether one more picture that is never dropped may be put."""
        return len(self._waiting) < self._wait_capacity

    def take(self) -> EncodedFrame | None:
        """The next frame to work on: the newest (LIVE) or the oldest (WAIT)."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def refuse(self, frame: EncodedFrame, error: EdgeVlmError) -> list[DroppedFrame]:
        """Counts a frame that never got in because its message was cut."""
        with self._lock:
            self._received += 1
            self._dropped[DropReason.DECODE_ERROR.value] += 1
            return [DroppedFrame.of(frame, DropReason.DECODE_ERROR, error)]

    def give_up(self, frame: EncodedFrame) -> list[DroppedFrame]:
        """Counts a frame that was taken and not worked on, as the session ended."""
        with self._lock:
            self._dropped[DropReason.BUSY.value] += 1
            return [DroppedFrame.of(frame, DropReason.BUSY)]

    def empty(self) -> list[DroppedFrame]:
        """Drops what is waiting, when the session ends."""
        with self._lock:
            left = [DroppedFrame.of(frame, DropReason.BUSY) for frame in self._waiting]
            self._waiting.clear()
            self._dropped.update(each.reason.value for each in left)
            return left

    def __len__(self) -> int:
        return len(self._waiting)

    def counts(self) -> tuple[int, dict[str, int]]:
        """Frames received, and frames dropped here by reason."""
        with self._lock:
            return self._received, dict(self._dropped)
