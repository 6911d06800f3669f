"""A question over HTTP to a stream that somebody else watches. Lives on the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from edge_vlm.errors import SessionGone
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.openai.chat_request import ChatRequest
from edge_vlm_runtime.openai.one_shot import OneShots
from edge_vlm_runtime.protocol.messages import error_from_detail

_numbers = itertools.count(1)

Tell = Callable[["protocol.ServerEvent | None"], None]


class LiveSessions(Protocol):
    """The server's sessions by name."""

    def listen(self, session_id: str, tell: Tell) -> tuple[SessionHandle, Callable[[], None]]:
        """From now on `tell` gets all that the session says, and None at its end, until the
        returned function is called. Raises SessionGone."""


async def ask_live(
    request: ChatRequest, sessions: LiveSessions, one_shots: OneShots
) -> AsyncGenerator[protocol.ServerEvent, None]:
    """What the session says about this question, up to `response.done`; its viewer sees it, too.

    Raises SessionGone, and what the question is refused with. Leaving early cancels the answer.
    """
    assert request.session is not None
    events: asyncio.Queue[protocol.ServerEvent | None] = asyncio.Queue()
    handle, stop = sessions.listen(request.session, events.put_nowait)
    event_id = f"http_{next(_numbers)}"
    response_id: str | None = None
    is_done = False
    try:
        handle.take(one_shots.question(request, event_id))
        while not is_done:
            event = await events.get()
            if event is None:
                raise SessionGone("the live session has ended", remedy="ask another one")
            if isinstance(event, protocol.Error) and event.error.event_id == event_id:
                is_done = True
                raise error_from_detail(event.error)
            if isinstance(event, protocol.ResponseCreated) and event.event_id == event_id:
                response_id = event.response_id
                yield event
            elif response_id is not None and response_id == getattr(event, "response_id", None):
                is_done = isinstance(event, protocol.ResponseDone)
                yield event
    finally:
        stop()
        # A question that waits yet cannot be withdrawn alone; it is answered to its viewer.
        if not is_done and response_id is not None:
            handle.take(protocol.ResponseCancel(response_id=response_id))
