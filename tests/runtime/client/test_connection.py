"""A connection over a websocket that misbehaves in ways a real one does not on demand."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.recording.recorder import Recorder
from edge_vlm_runtime.server.client_session import ClientSession
from edge_vlm_runtime.server.connection import Connection
from edge_vlm_runtime.server.sessions import SessionRegistry
from edge_vlm_runtime.session.budget import default_settings
from tests.runtime.server.live import run
from tests.runtime.session.fake_engines import FakeBundle, FakeClock


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
def fake_table(
    engines: FakeBundle | None = None, recorder: Recorder | None = None, **limits: Any
) -> Iterator[SessionRegistry]:
    """A server's sessions over engines without a model."""
    engines = engines or FakeBundle(FakeClock())
    given = ServerLimits(**limits)
    worker = EngineWorker(cast(LoadedBundle, engines), given)
    worker.start()
    try:
        yield SessionRegistry(
            worker=worker,
            bundle_name="fake",
            settings=default_settings(cast(Any, engines.bundle), given),
            model=ModelLimits.from_bundle(cast(Any, engines.bundle)),
            limits=given,
            recorder=recorder,
        )
    finally:
        worker.stop()


def test_a_client_that_does_not_read_is_disconnected_and_its_session_ended() -> None:
    async def serve(table: SessionRegistry, socket: StuckSocket) -> None:
        await Connection(socket, table).run()
        assert table.num_sessions == 0

    cases: list[dict[str, Any]] = [{"max_replay_events": 50}, {"max_replay_bytes": 10_000}]
    for limits in cases:
        socket = StuckSocket(messages=100)
        with fake_table(**limits) as table:
            run(serve(table, socket))
        assert socket.closed == [1013]


class LeavingSocket(StuckSocket):
    """Reads what it is sent, says nothing and goes."""

    async def receive(self) -> MutableMapping[str, Any]:
        await asyncio.sleep(0)
        return {"type": "websocket.disconnect", "code": 1000}

    async def send_text(self, data: str) -> None: ...


def test_a_session_that_has_ended_does_not_wait_for_a_collection() -> None:
    def sessions() -> list[ClientSession]:
        return [each for each in gc.get_objects() if type(each) is ClientSession]

    gc.collect()
    gc.disable()
    try:
        before = sessions()  # of other tests in this process
        with fake_table() as table:

            async def come_and_go() -> None:
                for _ in range(3):
                    await Connection(cast(Any, LeavingSocket(0)), table).run()
                assert table.num_sessions == 0

            run(come_and_go())
            left = [each for each in sessions() if all(each is not other for other in before)]
    finally:
        gc.enable()
    assert len(left) <= 1, "what holds them?"  # the engine thread's last message may be about one
