"""How many requests run, wait and are held in memory at once. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from edge_vlm.errors import MessageTooLarge, ServerBusy, TooManyRequests
from edge_vlm_runtime.protocol.settings import ServerLimits

MOST_RETRY_S = 60
EWMA_WEIGHT = 0.3
"""Weight of the last request's time in what is expected of the next one."""


class HeldBytes:
    """What one request takes of the memory for requests."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Raises MessageTooLarge, ServerBusy."""
        limits = self._queue.limits
        most = min(limits.max_request_bytes, limits.max_waiting_bytes)
        if self.num_bytes + num_bytes > most:
            raise MessageTooLarge(
                f"a request of more than {most} bytes",
                remedy="send fewer or smaller pictures, or start the server with a larger "
                "--max-request-bytes",
            )
        if self._queue.num_bytes + num_bytes > limits.max_waiting_bytes:
            raise ServerBusy("the memory for requests is full", remedy="try again in a moment")
        self.num_bytes += num_bytes
        self._queue.num_bytes += num_bytes


class RequestQueue:
    """Requests take turns, in the order in which they came."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._usual_s = 1.0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def retry_after_s(self) -> int:
        """When a turn may be free, at a guess."""
        return max(1, min(MOST_RETRY_S, round(self._usual_s * (len(self._waiting) + 1))))

    @contextmanager
    def held(self) -> Iterator[HeldBytes]:
        """The memory of one request, given back at the end."""
        held = HeldBytes(self)
        try:
            yield held
        finally:
            self.num_bytes -= held.num_bytes

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn and has it. Raises TooManyRequests at once when too many wait."""
        loop = asyncio.get_running_loop()
        if self._running >= self.limits.max_running_requests:
            if len(self._waiting) >= self.limits.max_waiting_requests:
                raise TooManyRequests(
                    f"{len(self._waiting)} requests are waiting already",
                    retry_after_s=self.retry_after_s,
                    remedy=f"try again in {self.retry_after_s} s",
                )
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._hand_on()
                elif turn in self._waiting:
                    self._waiting.remove(turn)
                raise
        else:
            self._running += 1
            self.idle.clear()
        began_s = loop.time()
        try:
            yield
        finally:
            self._usual_s += EWMA_WEIGHT * (loop.time() - began_s - self._usual_s)
            self._hand_on()

    def _hand_on(self) -> None:
        """The turn goes to whoever waits longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled, and its task has not been told yet
                turn.set_result(None)
                return
        self._running -= 1
        if self._running == 0:
            self.idle.set()
