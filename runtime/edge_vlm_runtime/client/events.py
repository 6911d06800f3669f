"""What a server says, to iterate over."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from edge_vlm.errors import ReplayLost
from edge_vlm_runtime import protocol

MAX_WAITING = 10_000
"""Events that wait to be taken."""

Kind = TypeVar("Kind", bound=protocol.ServerEvent)


class EventStream(Generic[Kind]):
    """Events from the moment it was made, in order; it ends when its client is closed.

    Iterating raises what ended the client otherwise, and ReplayLost when so many events waited that
    some had to be left out. Nothing is kept for a stream that nobody holds any more.
    """

    def __init__(self, kinds: tuple[type[Kind], ...]) -> None:
        self._kinds = kinds
        self._waiting: deque[Kind] = deque()
        self._is_over = False
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> EventStream[Kind]:
        return self

    async def __anext__(self) -> Kind:
        while not self._waiting and not self._is_over:
            self._news.clear()
            await self._news.wait()
        return self.take()

    def take(self) -> Kind:
        """One that waits already, or else the end, as iterating raises it."""
        if self._waiting:
            return self._waiting.popleft()
        raise self._failure or StopAsyncIteration

    def push(self, event: protocol.ServerEvent) -> None:
        """The next event, whatever it is."""
        if self._is_over or not isinstance(event, self._kinds):
            return
        if len(self._waiting) >= MAX_WAITING:
            self.end(
                ReplayLost(
                    f"{MAX_WAITING} events waited and nobody took them",
                    remedy="take them faster, or only the kinds that are needed",
                )
            )
            return
        self._waiting.append(event)
        self._news.set()

    def end(self, failure: Exception | None) -> None:
        """There will be no more."""
        if not self._is_over:
            self._is_over, self._failure = True, failure
            self._news.set()
