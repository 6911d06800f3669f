"""A message to a live session from inside the server, and what the session answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TypeVar

from edge_vlm.errors import SessionGone
from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.protocol.messages import error_from_detail

REPLY_TIMEOUT_S = 30.0

_numbers = itertools.count(1)

Reply = TypeVar("Reply", bound=protocol.ServerEvent)
Listeners = set[Callable[["protocol.ServerEvent | None"], None]]


async def request(
    handle: SessionHandle,
    listeners: Listeners,
    message: protocol.ClientMessage,
    kind: type[Reply],
) -> Reply:
    """`listeners`: of the session's events. Raises the error that it answers with, SessionGone."""
    events: asyncio.Queue[protocol.ServerEvent | None] = asyncio.Queue()
    message.event_id = f"server_{next(_numbers)}"
    listeners.add(events.put_nowait)
    try:
        handle.take(message)
        return await within(REPLY_TIMEOUT_S, _reply(events, message.event_id, kind))
    except asyncio.TimeoutError:
        raise SessionGone("the live session did not answer", remedy="try again") from None
    finally:
        listeners.discard(events.put_nowait)


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
