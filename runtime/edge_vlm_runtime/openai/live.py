"""Questions over HTTP to streams that somebody else watches. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from edge_vlm.errors import SessionGone, TooManyRequests
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.openai.chat_request import ChatRequest
from edge_vlm_runtime.openai.one_shot import OneShots
from edge_vlm_runtime.protocol.messages import error_from_detail

Tell = Callable[["protocol.ServerEvent | None"], None]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Somebody without a session of his own who says something to a live one."""

    handle: SessionHandle
    event_id: str
    """For his message: the viewer is not told when that is refused."""
    stop: Callable[[], None]


class LiveSessions(Protocol):
    """The server's sessions by name."""

    def listen(self, session_id: str, tell: Tell) -> Listening:
        """From now on `tell` gets all that the session says, and None at its end, until `stop` is
        called. Raises SessionGone."""


class LiveQuestions:
    """One for each server."""

    def __init__(self, sessions: LiveSessions, one_shots: OneShots, max_queued: int) -> None:
        """`max_queued`: questions that may wait in a session; half of the places are left to its
        viewer."""
        self._sessions = sessions
        self._one_shots = one_shots
        self._most = max(1, max_queued // 2)
        self._waiting: Counter[str] = Counter()
        """Questions by session that are not being answered yet, also those of askers who left."""

    async def ask(self, request: ChatRequest) -> AsyncGenerator[protocol.ServerEvent, None]:
        """What the session says about this question, up to `response.done`; its viewer sees it,
        too.

        Raises SessionGone, TooManyRequests, and what the question is refused with. Leaving early
        cancels the answer, at the latest when it begins.
        """
        name = request.session
        assert name is not None
        events: asyncio.Queue[protocol.ServerEvent | None] = asyncio.Queue()
        question = _Question(events.put_nowait)
        question.listening = self._sessions.listen(name, question.hear)
        try:
            if self._waiting[name] >= self._most:
                raise TooManyRequests(
                    f"{self._most} questions to this stream are waiting already",
                    remedy="ask again in a moment",
                )
            message = self._one_shots.question(request, question.listening.event_id)
        except BaseException:
            question.listening.stop()
            raise
        self._waiting[name] += 1
        question.on_begin = lambda: self._began(name)
        question.listening.handle.take(message)
        try:
            while True:
                event = await events.get()
                if event is None:
                    raise SessionGone("the live session has ended", remedy="ask another one")
                if isinstance(event, protocol.Error):
                    raise error_from_detail(event.error)
                yield event
                if isinstance(event, protocol.ResponseDone):
                    return
        finally:
            question.leave()

    def _began(self, name: str) -> None:
        self._waiting[name] -= 1
        if self._waiting[name] <= 0:
            del self._waiting[name]


class _Question:
    """One that waits, is answered, or is waited for by nobody any more."""

    listening: Listening

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.on_begin: Callable[[], None] = lambda: None
        self._response_id: str | None = None
        self._has_begun = False
        self._is_over = False
        self._is_left = False

    def hear(self, event: protocol.ServerEvent | None) -> None:
        """The session's next event, of which only those about this question are told."""
        if event is None or (
            isinstance(event, protocol.Error) and event.error.event_id == self.listening.event_id
        ):
            self._end()
        elif (
            isinstance(event, protocol.ResponseCreated)
            and event.event_id == self.listening.event_id
        ):
            self._response_id = event.response_id
            self._begin()
            if self._is_left:
                self._cancel()
        elif self._response_id is None or self._response_id != getattr(event, "response_id", None):
            return
        elif isinstance(event, protocol.ResponseDone):
            self._end()
        self._tell(event)

    def leave(self) -> None:
        """Nobody waits for it any more. One that waits cannot be withdrawn alone: it is cancelled
        when its turn comes."""
        self._is_left = True
        self._tell = lambda event: None
        if self._response_id is not None and not self._is_over:
            self._cancel()

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self.on_begin()

    def _cancel(self) -> None:
        self.listening.handle.take(protocol.ResponseCancel(response_id=self._response_id))
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._begin()
        self.listening.stop()
