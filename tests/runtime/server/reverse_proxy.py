"""A reverse proxy as people put one before the page: below a path, with another `Host`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from contextlib import suppress


class ReverseProxy:
    """Forwards what is asked for below `prefix` to a port here. Use as an async context manager."""

    def __init__(
        self,
        upstream_port: int,
        *,
        prefix: str = "",
        keeps_host: bool = False,
        missing: Collection[str] = (),
    ) -> None:
        """`missing`: paths that are not there, as on an older server."""
        self.upstream_port, self._prefix, self._keeps_host = upstream_port, prefix, keeps_host
        self._missing = missing
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.not_found: list[str] = []
        """Paths outside the prefix that were asked for."""

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ReverseProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._forward(reader, writer)
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        path = head.split(" ", 2)[1]
        if not path.startswith(f"{self._prefix}/") or path in self._missing:
            self.not_found.append(path)
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return
        head = head.replace(f" {path} ", f" {path.removeprefix(self._prefix)} ", 1)
        if not self._keeps_host:  # as nginx does unless told otherwise
            head = re.sub(r"(?mi)^host: .*\r$", f"Host: localhost:{self.upstream_port}\r", head)
        if "upgrade: websocket" not in head.lower():  # one request a connection
            head = re.sub(r"(?mi)^connection: .*\r$", "Connection: close\r", head)
        upstream, to_upstream = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        to_upstream.write(head.encode("latin-1"))
        ways = [
            asyncio.create_task(_pump(upstream, writer)),
            asyncio.create_task(_pump(reader, to_upstream)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            to_upstream.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
