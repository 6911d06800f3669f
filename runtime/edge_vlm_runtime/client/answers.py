"""What a client hands out: answers, and how many frames became what."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from edge_vlm.errors import EdgeVlmError, ProtocolError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.bounds import MOST_ANSWER, count

Answer: TypeAlias = protocol.ResponseDone
"""A finished answer, as the server sent it: `text`, `status`, `ttft_s`, `points` and the rest."""


@dataclass
class FrameCounts:
    """What became of the frames of a session, as far as its client was there."""

    processed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    cells_seen: int = 0
    cells_kept: int = 0
    cells_recomputed: float = 0.0
    """Those that were computed in front of the scorer; all that were seen, without `reuse`."""

    def add(
        self, event: protocol.FrameAccepted | protocol.FrameDropped | protocol.ClipChosen
    ) -> None:
        if isinstance(event, protocol.ClipChosen):
            self.cells_kept = event.cells_kept
        elif isinstance(event, protocol.FrameAccepted):
            self.processed += 1
            self.cells_seen += event.cells_seen
            self.cells_kept += event.cells_kept
            self.cells_recomputed += event.share_recomputed * event.cells_seen
        else:
            count(self.dropped, event.reason)


class AnswerStream:
    """One answer while it comes: iterate for its deltas, then read `answer`.

    Both raise the typed error that the server sent instead, and what ended the client.
    """

    def __init__(
        self, question: str, wait: Callable[[asyncio.Future[Answer]], Awaitable[Answer]]
    ) -> None:
        """`wait`: `Client.wait`."""
        self.question = question
        self.response_id: str | None = None
        self._wait = wait
        self._length = 0
        self._deltas: asyncio.Queue[str | None] = asyncio.Queue()
        self._done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # An answer nobody waits for must not warn about its exception.
        self._done.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def __aiter__(self) -> AsyncIterator[str]:
        while (delta := await self._deltas.get()) is not None:
            yield delta
        self.push(None)  # for whoever iterates again, or too
        await self.answer()

    async def answer(self) -> Answer:
        """The whole answer."""
        return await self._wait(self._done)

    def push(self, delta: str | None) -> None:
        """The next piece; None: there will be no more. Raises ProtocolError for an answer without
        end."""
        self._length += len(delta or "")
        if self._length > MOST_ANSWER:
            raise ProtocolError(f"an answer of more than {MOST_ANSWER} characters")
        self._deltas.put_nowait(delta)

    def finish(self, result: Answer | EdgeVlmError) -> None:
        """Of this answer, whatever happens to others."""
        self.push(None)
        if isinstance(result, EdgeVlmError):
            self._done.set_exception(result)
        else:
            self._done.set_result(result)
