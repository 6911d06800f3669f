"""A TCP relay before an MQTT broker that notes which events the broker acknowledged.

It outlives the broker, so what was acknowledged is known however the broker ended. Reads just the
packets it needs (MQTT 3.1.1 and 5, sections 2.1 and 3.3): PUBLISH with QoS 1, and PUBACK.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

PUBLISH, PUBACK, CONNECT = 3, 4, 1
MQTT_5 = 5


def packets(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    """Takes whole packets out of the buffer: first byte, and what stands behind the length."""
    while len(buffer) >= 2:
        length, place = 0, 1
        while True:
            if place >= len(buffer):
                return
            byte = buffer[place]
            length |= (byte & 127) << (7 * (place - 1))
            place += 1
            if not byte & 128:
                break
        if len(buffer) < place + length:
            return
        head, body = buffer[0], bytes(buffer[place : place + length])
        del buffer[: place + length]
        yield head, body


class _Connection:
    """What one connection says."""

    def __init__(self, acknowledged: Counter[str]) -> None:
        self._acknowledged = acknowledged
        self._version = 4
        self._under_way: dict[int, str] = {}

    def from_client(self, head: int, body: bytes) -> None:
        if head >> 4 == CONNECT:
            self._version = body[2 + int.from_bytes(body[:2], "big")]
        elif head >> 4 == PUBLISH and head >> 1 & 3 == 1:
            place = 2 + int.from_bytes(body[:2], "big")
            number = int.from_bytes(body[place : place + 2], "big")
            place += 2
            if self._version == MQTT_5:  # properties; ours are shorter than 128 bytes, or a picture
                place += 1 + body[place]
            with suppress(ValueError, KeyError, TypeError):  # a picture has no id
                self._under_way[number] = json.loads(body[place:])["id"]

    def from_broker(self, head: int, body: bytes) -> None:
        if head >> 4 == PUBACK:
            event = self._under_way.pop(int.from_bytes(body[:2], "big"), None)
            if event is not None:
                self._acknowledged[event] += 1


class MqttTap:
    """On a thread of its own; `acknowledged` counts by the event's `id`."""

    def __init__(self, broker_port: int) -> None:
        self.acknowledged: Counter[str] = Counter()
        self._broker_port = broker_port
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._broker_port)
        except OSError:  # it is away
            writer.transport.abort()
            return
        connection = _Connection(self.acknowledged)
        for source, sink, note in (
            (reader, back, connection.from_client),
            (there, writer, connection.from_broker),
        ):
            task = asyncio.create_task(self._pump(source, sink, note))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        note: Callable[[int, bytes], None],
    ) -> None:
        buffer = bytearray()
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)  # first: what was noted has been handed on
                buffer += data
                for head, body in packets(buffer):
                    note(head, body)
                await sink.drain()
        sink.close()
