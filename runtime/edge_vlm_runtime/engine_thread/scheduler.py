"""Whose turn it is on one set of engines.

In every round each session does what its viewer's messages ask for, a few milliseconds of it. Then
come answers: each session that owes one decodes a token, or takes up its next question. Then each
session in turn does a unit of video, a frame or an alert check; while anybody is being answered
only as far as the answers are slowed by no more than a set share. So neither a viewer who asks nor
one who only watches is kept waiting without bound, and a session with nothing to do costs three
calls that return at once.

Messages and the beginnings of answers are what a viewer can ask for without end. Each session has a
share of time for them; one that has used it up waits as long as others have something to do.

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
MESSAGES_NS = 2_000_000
"""Of a session's messages in one round, and whatever the last of them takes longer."""
SHARE = 0.25
"""Of all time, which a session may use for messages and beginnings while others are waiting."""
SAVED_NS, OWED_NS = 50_000_000, 500_000_000
"""Most of it that is saved up, and that is owed."""


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


class Ledger:
    """What a session has left of its share."""

    def __init__(self, now_ns: int) -> None:
        self._left_ns = float(SAVED_NS)
        self._at_ns = now_ns

    def suffices(self, now_ns: int) -> bool:
        self._left_ns = min(SAVED_NS, self._left_ns + SHARE * (now_ns - self._at_ns))
        self._at_ns = now_ns
        return self._left_ns > 0.0

    def took(self, took_ns: int) -> None:
        self._left_ns = max(self._left_ns - took_ns, -OWED_NS)


class Scheduler(Generic[SessionT]):
    """One round after the other over all sessions. One thread."""

    def __init__(
        self,
        *,
        answer: Callable[[SessionT], bool],
        watch: Callable[[SessionT], bool],
        clock_ns: Callable[[], int],
        max_answer_slowdown: float,
        obey: Callable[[SessionT], bool] = lambda session: False,
        begins: Callable[[SessionT], bool] = lambda session: False,
    ) -> None:
        """`answer` and `watch` do one unit of a session's work and `obey` what one message asks
        for, False when it has none. `begins`: its next unit of an answer is the first of one.

        `max_answer_slowdown`: time of video while answers are decoded, as a share of theirs.
        """
        self._do_answer = answer
        self._do_watch = watch
        self._do_obey = obey
        self._begins = begins
        self._clock_ns = clock_ns
        self._bucket = TokenBucket(max_answer_slowdown)
        self._sessions: deque[SessionT] = deque()
        self._ledgers: dict[SessionT, Ledger] = {}
        self._are_busy: set[SessionT] = set()
        """Sessions within their share that had something to do in this round."""
        self._were_busy: set[SessionT] = set()
        """In the last one."""

    def add(self, session: SessionT) -> None:
        self._sessions.append(session)
        self._ledgers[session] = Ledger(self._clock_ns())

    def remove(self, session: SessionT) -> None:
        """No more turns for it. May be called by its own work, and more than once."""
        if session in self._sessions:
            self._sessions.remove(session)
            del self._ledgers[session]
            self._are_busy.discard(session)
            self._were_busy.discard(session)

    @property
    def sessions(self) -> list[SessionT]:
        """All of them; the next one to watch is the first."""
        return list(self._sessions)

    def round(self, *, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """A turn for everybody; False when nobody had anything to do.

        `interrupted`: asked before each unit of video; True ends the round there (a question may
        have come), and the next one goes on with whoever would have been next.
        """
        now_ns = self._clock_ns()
        self._were_busy, self._are_busy = self._are_busy, set()
        owing = [each for each in self.sessions if not self._ledgers[each].suffices(now_ns)]
        obeyed = [
            self._obey(each, each in owing) for each in sorted(self.sessions, key=owing.count)
        ]
        answered = False
        postponed = False
        for session in self.sessions:
            owes = session in owing
            begins = self._begins(session)
            if owes and begins and self._others_wait(session):
                postponed = True
                continue
            begin_ns = self._clock_ns()
            if self._do_answer(session):
                answered = True
                took_ns = self._clock_ns() - begin_ns
                self._bucket.answered(took_ns)
                self._worked(session, owes, took_ns if begins else 0)
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
        return answered or watched or postponed or any(obeyed)

    def _others_wait(self, session: SessionT) -> bool:
        return bool((self._were_busy | self._are_busy) - {session})

    def _worked(self, session: SessionT, owes: bool, took_ns: int) -> None:
        if session in self._ledgers:
            self._ledgers[session].took(took_ns)
            if not owes:
                self._are_busy.add(session)

    def _obey(self, session: SessionT, owes: bool) -> bool:
        """What a session's messages ask for now; False when there was nothing. One that owes does
        one message, and only while nobody else has something to do."""
        if owes and self._others_wait(session):
            return True  # there may be
        begin_ns = self._clock_ns()
        obeyed = False
        while session in self._ledgers and self._do_obey(session):
            obeyed = True
            if owes or self._clock_ns() - begin_ns >= MESSAGES_NS:
                break
        if obeyed:
            self._worked(session, owes, self._clock_ns() - begin_ns)
        return obeyed
