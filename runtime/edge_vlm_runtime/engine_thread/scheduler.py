"""Whose turn it is on one set of engines.

Answers come first: in every round each session that owes one decodes a token, or takes up its next
question. Then each session in turn does a unit of video, a frame or an alert check; while anybody
is being answered only as far as the answers are slowed by no more than a set share. So neither a
viewer who asks nor one who only watches is kept waiting without bound, and a session with nothing
to do costs two calls that return at once.

No I/O, no threads; the clock is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

SessionT = TypeVar("SessionT")

BURST = 2.0
"""Units of video that may be saved up: a long prefill is not followed by a long pause."""
EWMA_WEIGHT = 0.3
"""Weight of the last unit's time in what is expected of the next one."""


class TokenBucket:
    """Time that video may take while answers are decoded: a share of the answers' own time.

    A unit begins when its expected time has been saved up; what it took beyond that is owed.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._saved_ns = 0.0
        self._expected_ns = 0.0

    def suffices(self) -> bool:
        return self._saved_ns > 0 and self._saved_ns >= self._expected_ns

    def answered(self, took_ns: int) -> None:
        earned_ns = self._share * took_ns
        most_ns = max(BURST * self._expected_ns, earned_ns)
        self._saved_ns = min(self._saved_ns + earned_ns, most_ns)

    def watched(self, took_ns: int, *, owed: bool) -> None:
        """`owed`: somebody was being answered meanwhile."""
        if owed:
            self._saved_ns -= took_ns
        before_ns = self._expected_ns or took_ns
        self._expected_ns = before_ns + EWMA_WEIGHT * (took_ns - before_ns)

    def reset(self) -> None:
        """Nobody is being answered."""
        self._saved_ns = 0.0


class Scheduler(Generic[SessionT]):
    """One round after the other over all sessions. One thread."""

    def __init__(
        self,
        *,
        answer: Callable[[SessionT], bool],
        watch: Callable[[SessionT], bool],
        clock_ns: Callable[[], int],
        max_answer_slowdown: float,
    ) -> None:
        """`answer` and `watch` do one unit of a session's work, False when it has none.

        `max_answer_slowdown`: time of video while answers are decoded, as a share of theirs.
        """
        self._do_answer = answer
        self._do_watch = watch
        self._clock_ns = clock_ns
        self._bucket = TokenBucket(max_answer_slowdown)
        self._sessions: deque[SessionT] = deque()

    def add(self, session: SessionT) -> None:
        self._sessions.append(session)

    def remove(self, session: SessionT) -> None:
        """No more turns for it. May be called by its own work, and more than once."""
        if session in self._sessions:
            self._sessions.remove(session)

    @property
    def sessions(self) -> list[SessionT]:
        """All of them; the next one to watch is the first."""
        return list(self._sessions)

    def round(self, *, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """A turn for everybody; False when nobody had anything to do.

        `interrupted`: asked before each unit of video; True ends the round there (a question may
        have come), and the next one goes on with whoever would have been next.
        """
        answered = False
        for session in self.sessions:
            begin_ns = self._clock_ns()
            if self._do_answer(session):
                answered = True
                self._bucket.answered(self._clock_ns() - begin_ns)
        if not answered:
            self._bucket.reset()
        watched = False
        for session in self.sessions:
            if (answered and not self._bucket.suffices()) or (watched and interrupted()):
                break
            if session not in self._sessions:
                continue
            self._sessions.rotate(-1)
            begin_ns = self._clock_ns()
            if self._do_watch(session):
                self._bucket.watched(self._clock_ns() - begin_ns, owed=answered)
                watched = True
        return answered or watched
