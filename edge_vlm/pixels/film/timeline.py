"""A clock that may jump, put on one that does not.

Recorders restart their clock, transport streams are joined, and single times are wild. Whoever
shows such a stream goes on from where it was. No library.
"""

from __future__ import annotations

LONGEST_GAP_S = 60.0
"""A time farther ahead than this is another clock, not a pause."""
_BACK_S = 0.25
"""Times that go back by less are inexact; the later one counts."""
_RETURN_S = 1.0
"""After a jump, a time this near to where the clock was before is the old clock again."""
_LONGEST_USUAL_S = 1.0
"""A gap longer than this is a pause, not the length of a frame."""


class Timeline:
    """Places the times of one stream, in the order in which they are shown, from 0 on."""

    def __init__(self, usual_s: float) -> None:
        """`usual_s`: length of a frame as long as no other is known."""
        self.end_s = 0.0
        """When the last one ends."""
        self.jumps = 0
        """How often the clock jumped."""
        self._offset_s: float | None = None
        """What is taken from the stream's times."""
        self._before_s: float | None = None
        """The same before the last jump, until the time after it is placed."""
        self._last_s = 0.0
        self._usual_s = usual_s
        self._gap_s = 0.0
        """From one time to the next, where neither a jump nor a pause is between."""

    @property
    def start_s(self) -> float:
        """The first time on the stream's own clock; 0 before it."""
        return 0.0 if self._offset_s is None else self._offset_s

    def look_ahead(self, time_s: float) -> None:
        """What comes next may be from as late as this: whoever shows the stream jumps there."""
        self.end_s = max(self.end_s, time_s)

    def place(self, clock_s: float | None, length_s: float | None = None) -> float:
        """Where something is shown that its stream calls `clock_s` (None: right after the last).

        `length_s`: how long; None: as long as the last one.
        """
        jumps, last_s = self.jumps, self._last_s
        time_s = self._placed(clock_s)
        if jumps == self.jumps and 0.0 < time_s - last_s < _LONGEST_USUAL_S:
            self._gap_s = time_s - last_s
            self._usual_s = self._gap_s if length_s is None else self._usual_s
        if length_s is None or not 0.0 < length_s <= LONGEST_GAP_S:
            length_s = self._usual_s
        self._usual_s = length_s
        self._last_s, self.end_s = time_s, time_s + length_s
        return time_s

    def _placed(self, clock_s: float | None) -> float:
        if clock_s is None:
            return self.end_s
        if self._offset_s is None:
            self._offset_s = clock_s
            return 0.0
        before_s, self._before_s = self._before_s, None
        time_s = clock_s - self._offset_s
        returns = before_s is not None and self._continues(clock_s - before_s)
        if self._last_s - _BACK_S <= time_s <= self.end_s + LONGEST_GAP_S and not returns:
            return max(time_s, self._last_s)
        self.jumps += 1
        if before_s is not None and returns:
            self._offset_s = before_s
            return max(clock_s - before_s, self._last_s)
        resumed_s = max(self.end_s, self._last_s + self._gap_s)
        self._before_s, self._offset_s = self._offset_s, clock_s - resumed_s
        return resumed_s

    def _continues(self, time_s: float) -> bool:
        return self._last_s - _BACK_S <= time_s <= self.end_s + _RETURN_S
