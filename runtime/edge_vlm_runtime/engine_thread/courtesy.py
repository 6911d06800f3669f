"""How much of the engines' time sessions get that nobody watches live, while somebody talks.

A question waits for the unit of work that is under way when it comes: half of one on average, if
there always is one. So while a conversation goes on, units of background work are followed by
pauses. No I/O, no threads; times are the caller's, in nanoseconds.
"""

from __future__ import annotations

CONVERSATION_NS = 30_000_000_000
"""A conversation goes on for so long after its last token."""
SHARE = 0.25
"""Of the time, for background work meanwhile: a question waits for an eighth of a unit then."""


class Courtesy:
    """Of one engine thread."""

    def __init__(self) -> None:
        self._talked_ns: int | None = None
        self._resumes_ns = 0

    def talked(self, now_ns: int) -> None:
        """Somebody who watches live was being answered."""
        self._talked_ns = now_ns

    def worked(self, begin_ns: int, end_ns: int) -> None:
        """A unit of background work was done."""
        self._resumes_ns = end_ns + round((end_ns - begin_ns) * (1.0 / SHARE - 1.0))

    def pause_ns(self, now_ns: int) -> int:
        """How long background work has to wait yet."""
        if self._talked_ns is None or now_ns - self._talked_ns > CONVERSATION_NS:
            return 0
        return max(self._resumes_ns - now_ns, 0)
