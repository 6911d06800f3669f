"""The numbered events of one session, the newest of them kept for a viewer who comes back.

One buffer for both ends: what a connection has still to send and what it may have to send again.
No I/O, no clock, no threads.
"""

from __future__ import annotations

from collections import deque

from edge_vlm.errors import ProtocolError, ReplayLost
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.base import encode_named


class EventLog:
    """Bounded by a number of events and by bytes; the oldest go first, the newest never does."""

    def __init__(self, *, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._texts: deque[str] = deque()
        self._num_bytes = 0
        self.newest = 0
        """Number of the newest event; 0 before the first."""

    @property
    def oldest(self) -> int:
        """Number of the oldest event kept; one past `newest` when there is none."""
        return self.newest - len(self._texts) + 1

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def append(self, event: protocol.ServerEvent) -> None:
        """Gives the event its number and keeps its text."""
        self.newest += 1
        event.sequence = self.newest
        text = encode_named(event, f"srv_{self.newest}")
        self._texts.append(text)
        self._num_bytes += len(text)
        while len(self._texts) > 1 and (
            len(self._texts) > self._max_events or self._num_bytes > self._max_bytes
        ):
            self._num_bytes -= len(self._texts.popleft())

    def forget(self, last_sequence: int) -> None:
        """Nobody will ask for the events up to this one again."""
        while self._texts and self.oldest <= last_sequence:
            self._num_bytes -= len(self._texts.popleft())

    def covers(self, last_sequence: int) -> bool:
        """Whether every event after this one is still here."""
        return self.oldest - 1 <= last_sequence <= self.newest

    def require(self, last_sequence: int) -> None:
        """Raises ReplayLost unless a viewer who saw `last_sequence` last can go on from there;
        ProtocolError if there never was such an event."""
        if not 0 <= last_sequence <= self.newest:
            raise ProtocolError(
                f"the last event of this session is number {self.newest}, not {last_sequence}"
            )
        if not self.covers(last_sequence):
            raise ReplayLost(
                f"events {last_sequence + 1} to {self.oldest - 1} are no longer kept",
                remedy="start a new session",
            )

    def text(self, sequence: int) -> str:
        """JSON text of an event that is still kept. Raises ValueError for any other."""
        if not self.oldest <= sequence <= self.newest:
            raise ValueError(f"event {sequence} is not one of {self.oldest}..{self.newest}")
        return self._texts[sequence - self.newest - 1]
