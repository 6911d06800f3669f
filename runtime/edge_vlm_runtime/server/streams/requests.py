"""A message to a live session from inside the server, and what the session answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from edge_vlm.errors import SessionGone
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.protocol.messages import error_from_detail
from edge_vlm_runtime.protocol.responses import ResponseOptions

REPLY_TIMEOUT_S = 30.0

Reply = TypeVar("Reply", bound=protocol.ServerEvent)
Listeners = set[Callable[["protocol.ServerEvent | None"], None]]


async def request(
    handle: SessionHandle,
    listeners: Listeners,
    message: protocol.ClientMessage,
    kind: type[Reply],
) -> Reply:
    """`listeners`: of the session's events. `message` has an `event_id` of its own. Raises the
    error that it answers with, SessionGone."""
    assert message.event_id is not None
    events: asyncio.Queue[protocol.ServerEvent | None] = asyncio.Queue()
    listeners.add(events.put_nowait)
    try:
        handle.take(message)
        return await within(REPLY_TIMEOUT_S, _reply(events, message.event_id, kind))
    except asyncio.TimeoutError:
        raise SessionGone("the live session did not answer", remedy="try again") from None
    finally:
        listeners.discard(events.put_nowait)


async def ask(
    handle: SessionHandle, listeners: Listeners, question: str, event_id: str
) -> protocol.ResponseDone:
    """The answer to a question that no dialogue goes before. Raises what it is refused with,
    SessionGone. Cancelled, the answer ends."""
    events: asyncio.Queue[protocol.ServerEvent | None] = asyncio.Queue()
    options = ResponseOptions(conversation="none")
    message = protocol.ResponseCreate(text=question, response=options)
    message.event_id = event_id
    listeners.add(events.put_nowait)
    response_id: str | None = None
    try:
        handle.take(message)
        created = await _reply(events, event_id, protocol.ResponseCreated)
        response_id = created.response_id
        while True:
            event = await events.get()
            if event is None:
                raise SessionGone("the live session has ended", remedy="ask another one")
            if isinstance(event, protocol.ResponseDone) and event.response_id == response_id:
                response_id = None
                return event
    finally:
        listeners.discard(events.put_nowait)
        if response_id is not None:
            handle.take(protocol.ResponseCancel(response_id=response_id))


async def _reply(
    events: asyncio.Queue[protocol.ServerEvent | None], event_id: str, kind: type[Reply]
) -> Reply:
    while True:
        event = await events.get()
        if event is None:
            raise SessionGone("the live session has ended", remedy="ask another one")
        if isinstance(event, protocol.Error) and event.error.event_id == event_id:
            raise error_from_detail(event.error)
        if isinstance(event, kind) and getattr(event, "event_id", None) == event_id:
            return event
