"""A connection over a websocket that misbehaves in ways a real one does not on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

from edge_vlm_runtime.connection import Connection
from edge_vlm_runtime.engines import Engines
from edge_vlm_runtime.served_session import SessionTable
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


@contextmanager
def fake_table(**limits: Any) -> Iterator[SessionTable]:
    """A server's sessions over engines without a model."""
    engines = FakeEngines(FakeClock())
    given = ServerLimits(**limits)
    worker = EngineWorker(cast(Engines, engines), given)
    worker.start()
    try:
        yield SessionTable(
            worker=worker,
            bundle_name="fake",
            settings=default_settings(cast(Any, engines.bundle), given),
            model=ModelLimits.from_bundle(cast(Any, engines.bundle)),
            limits=given,
        )
    finally:
        worker.stop()


def test_a_client_that_does_not_read_is_disconnected_and_its_session_ended() -> None:
    async def serve(table: SessionTable, socket: StuckSocket) -> None:
        await Connection(socket, table).run()
        assert table.num_sessions == 0

    for limits in ({"max_replay_events": 50}, {"max_replay_bytes": 10_000}):
        socket = StuckSocket(messages=100)
        with fake_table(**limits) as table:
            run(serve(table, socket))
        assert socket.closed == [1013]
