"""A connection over a websocket that misbehaves in ways a real one does not on demand."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, cast

from edge_vlm_runtime.connection import MAX_OUTBOX_EVENTS, Connection
from edge_vlm_runtime.engines import Engines
from edge_vlm_runtime.settings import ModelLimits, ServerLimits, default_settings
from edge_vlm_runtime.worker import EngineWorker
from tests.runtime.fake_engines import FakeClock, FakeEngines
from tests.runtime.live import run


class StuckSocket:
    """Takes messages in, but what is sent to it is never read."""

    def __init__(self, messages: int) -> None:
        self._left = messages
        self.closed: list[int] = []

    async def receive(self) -> MutableMapping[str, Any]:
        if self._left == 0:
            await asyncio.Event().wait()
        self._left -= 1
        return {"type": "websocket.receive", "text": "garbage"}

    async def send_text(self, data: str) -> None:
        await asyncio.Event().wait()

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.closed.append(code)


def test_a_client_that_does_not_read_is_disconnected() -> None:
    engines = FakeEngines(FakeClock())
    limits = ServerLimits()
    worker = EngineWorker(cast(Engines, engines), limits)
    worker.start()
    socket = StuckSocket(messages=MAX_OUTBOX_EVENTS + 10)

    async def serve() -> None:
        connection = Connection(
            socket,
            worker=worker,
            bundle_name="fake",
            settings=default_settings(cast(Any, engines.bundle), limits),
            model=ModelLimits.from_bundle(cast(Any, engines.bundle)),
            limits=limits,
        )
        await connection.run()

    try:
        run(serve())
    finally:
        worker.stop()
    assert socket.closed == [1013]
