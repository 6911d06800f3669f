"""What a session counts for `session.stats`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason


class SessionStatsCounter:
    """Counts since the session began; rates are since the last event."""

    def __init__(self, now_ns: int) -> None:
        self._processed = 0
        self._dropped: Counter[str] = Counter()
        self._cells_seen = 0
        self._cells_kept = 0
        self._before = (now_ns, 0, 0)
        self.last_ttft_s: float | None = None
        self.last_tokens_per_s: float | None = None

    @property
    def num_accepted(self) -> int:
        """Frames that were encoded."""
        return self._processed

    def accepted(self, cells_seen: int, cells_kept: int) -> None:
        """A frame was encoded."""
        self._processed += 1
        self._cells_seen += cells_seen
        self._cells_kept += cells_kept

    def chosen(self, cells_kept: int) -> None:
        """Of all frames so far together, so many cells are kept."""
        self._cells_kept = cells_kept

    def dropped(self, reason: DropReason) -> None:
        """A frame that came to the session was not encoded."""
        self._dropped[reason.value] += 1

    def event(
        self, now_ns: int, *, received: int, dropped: dict[str, int], **gauges: Any
    ) -> protocol.SessionStats:
        """`received` frames so far, and those of them `dropped` before they came to the session;
        `gauges` are the event's other fields."""
        then_ns, received_then, processed_then = self._before
        elapsed_s = max((now_ns - then_ns) * 1e-9, 1e-9)
        self._before = (now_ns, received, self._processed)
        return protocol.SessionStats(
            frames_received=received,
            frames_processed=self._processed,
            frames_dropped=dict(self._dropped + Counter(dropped)),
            fps_in=(received - received_then) / elapsed_s,
            fps_processed=(self._processed - processed_then) / elapsed_s,
            cells_seen=self._cells_seen,
            cells_kept=self._cells_kept,
            ttft_s=self.last_ttft_s,
            tokens_per_s=self.last_tokens_per_s,
            **gauges,
        )
