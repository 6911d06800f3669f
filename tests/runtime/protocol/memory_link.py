"""A websocket without a network: breaks after so many messages each way, and loses what is under
way. The real client, connection and sessions run over it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK
from websockets.frames import Close

from edge_vlm_runtime.client import connection as line
from edge_vlm_runtime.client import exchange
from edge_vlm_runtime.server.connection import Connection
from edge_vlm_runtime.server.sessions import SessionRegistry
from tests.runtime.server.live import TIMEOUT_S


@dataclass(frozen=True)
class Break:
    """Where a connection breaks: behind so many messages from the client, or from the server."""

    up: int
    down: int
    loses_tail: bool
    """What was sent and not read yet is lost too, as with a reset; else it still arrives."""


NEVER = Break(1 << 30, 1 << 30, False)


class MemoryLink:
    """Both ends of one connection."""

    def __init__(self, breaks: Break) -> None:
        self._breaks = breaks
        self._up: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._down: asyncio.Queue[str | None] = asyncio.Queue()
        self._num_up = self._num_down = 0
        self._is_broken = False
        self._closed: Close | None = None
        self.arrived: list[str] = []
        """Everything the client read from it."""

    def cut(self) -> None:
        if self._is_broken:
            return
        self._is_broken = True
        for queue in (self._up, self._down):
            while self._breaks.loses_tail and not queue.empty():
                queue.get_nowait()
            queue.put_nowait(None)

    def cut_for_client(self) -> None:
        """The server does not notice: nothing more comes, and what it sends goes nowhere."""
        self._is_broken = True
        self._down.put_nowait(None)

    def _error(self) -> ConnectionClosed:
        if self._closed is None:
            return ConnectionClosedError(None, None)
        kind = ConnectionClosedOK if self._closed.code in (1000, 1001) else ConnectionClosedError
        return kind(self._closed, self._closed, True)

    # ---- the client's end, as websockets has it ------------------------------------------------

    async def send(self, data: str | bytes) -> None:
        await asyncio.sleep(0)
        if self._is_broken or self._closed is not None:
            raise self._error()
        self._num_up += 1
        if self._num_up > self._breaks.up:
            self.cut()
        else:
            self._up.put_nowait(data)

    async def recv(self) -> str:
        text = await self._down.get()
        if text is None:
            self._down.put_nowait(None)
            raise self._error()
        self.arrived.append(text)
        return text

    # `close` is the same on both ends.

    # ---- the server's end, as Starlette has it -------------------------------------------------

    async def receive(self) -> MutableMapping[str, Any]:
        data = await self._up.get()
        if data is None:
            return {"type": "websocket.disconnect", "code": 1006 if self._is_broken else 1000}
        return {"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data}

    async def send_text(self, data: str) -> None:
        await asyncio.sleep(0)
        if self._is_broken or self._closed is not None:
            raise OSError("the connection is gone")
        self._num_down += 1
        if self._num_down > self._breaks.down:
            self.cut()
        else:
            self._down.put_nowait(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        if not self._is_broken and self._closed is None:
            self._closed = Close(code, reason or "")
            self._up.put_nowait(None)
            self._down.put_nowait(None)


class Network:
    """Where clients connect to a table's sessions; each connection breaks as planned."""

    def __init__(self, table: SessionRegistry, breaks: Sequence[Break]) -> None:
        self._table = table
        self._breaks = list(breaks)
        self.links: list[MemoryLink] = []
        self._served: list[asyncio.Task[None]] = []

    async def connect(self, url: str, access: line.Access) -> MemoryLink:
        link = MemoryLink(self._breaks.pop(0) if self._breaks else NEVER)
        self.links.append(link)
        connection = Connection(link, self._table, resumes="resume" in url)
        self._served.append(asyncio.create_task(connection.run()))
        return link

    async def served(self, link: MemoryLink) -> None:
        """Waits until this connection is served no more."""
        await self._served[self.links.index(link)]

    async def settle(self) -> None:
        """Waits until no connection is served any more."""
        await asyncio.gather(*self._served)


@contextmanager
def network(table: SessionRegistry, breaks: Sequence[Break] = ()) -> Iterator[Network]:
    """Clients of this process connect through memory, come back without a pause, and wait for a
    busy machine's engine thread to end their sessions."""
    made = Network(table, breaks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line, "_connect", made.connect)
        patch.setattr(line, "FIRST_PAUSE_S", 0.001)
        patch.setattr(exchange, "CLOSE_TIMEOUT_S", TIMEOUT_S)
        yield made
