"""What a session counts for `session.stats`."""

from __future__ import annotations

from typing import Any

from edge_vlm_runtime import protocol


class SessionStatsCounter:
    """Counts since the session began; rates are since the last event."""

    def __init__(self, now_ns: int) -> None:
        self._processed = 0
        self._cells_seen = 0
        self._cells_kept = 0
        self._before = (now_ns, 0, 0)
        self.last_ttft_s: float | None = None
        self.last_tokens_per_s: float | None = None

    def frame(self, cells_seen: int, cells_kept: int) -> None:
        """A frame was encoded."""
        self._processed += 1
        self._cells_seen += cells_seen
        self._cells_kept += cells_kept

    def event(
        self, *, now_ns: int, received: int, dropped: dict[str, int], **gauges: Any
    ) -> protocol.SessionStats:
        """`received` and `dropped` frames so far; `gauges` are the event's other fields."""
        then_ns, received_then, processed_then = self._before
        elapsed_s = max((now_ns - then_ns) * 1e-9, 1e-9)
        self._before = (now_ns, received, self._processed)
        return protocol.SessionStats(
            frames_received=received,
            frames_processed=self._processed,
            frames_dropped=dropped,
            fps_in=(received - received_then) / elapsed_s,
            fps_processed=(self._processed - processed_then) / elapsed_s,
            cells_seen=self._cells_seen,
            cells_kept=self._cells_kept,
            ttft_s=self.last_ttft_s,
            tokens_per_s=self.last_tokens_per_s,
            **gauges,
        )
