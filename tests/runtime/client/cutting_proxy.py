"""A TCP proxy that cuts connections in the middle of whatever is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType


class CuttingProxy:
    """Forwards to `port`. Connection i is reset behind `budgets[i]` bytes to the client, later ones
    never; nobody gets through while `is_down`."""

    def __init__(self, port: int, budgets: Sequence[int] = ()) -> None:
        self._target = port
        self._budgets = list(budgets)
        self._server: asyncio.Server
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0
        self.is_down = False
        self.num_cut = 0

    async def __aenter__(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime"

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        budget = self._budgets.pop(0) if self._budgets else None
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back]
        self._tasks += [
            asyncio.create_task(self._pump(reader, back, None)),
            asyncio.create_task(self._pump(there, writer, budget)),
        ]

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, budget: int | None
    ) -> None:
        while data := await source.read(1 << 16):
            if budget is not None and len(data) >= budget:
                sink.write(data[:budget])  # half a message, perhaps
                self.num_cut += 1
                self.cut()
                return
            if budget is not None:
                budget -= len(data)
            sink.write(data)
            await sink.drain()
        sink.close()
