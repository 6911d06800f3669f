"""A server's sessions on engines that fail, stall or stop: nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from edge_vlm.errors import ConfigError, InternalError, ServerBusy
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.engine_thread import worker
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.connection import MAX_WAITING_CALLS
from edge_vlm_runtime.server.sessions import ClientSession, Deliveries, SessionRegistry
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.test_connection import fake_table
from tests.runtime.protocol.memory_link import Network, network
from tests.runtime.server.live import TIMEOUT_S, run
from tests.runtime.session.fake_engines import ANSWER, FakeBundle, FakeClock

URL = "ws://memory/v1/realtime"


class Gate:
    """The engines are busy with it until it is opened, and with nothing else once it is made."""

    def __init__(self, table: SessionRegistry) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()
        worker_of(table).post(self._wait)
        assert self._reached.wait(TIMEOUT_S)

    def _wait(self) -> None:
        self._reached.set()
        assert self._opened.wait(TIMEOUT_S)

    def open(self) -> None:
        self._opened.set()


def worker_of(table: SessionRegistry) -> EngineWorker:
    return table._worker


async def until_engines_are_through(table: SessionRegistry) -> None:
    """Everything that the engines were asked so far is done, and the loop has been told."""
    loop = asyncio.get_running_loop()
    through = asyncio.Event()

    def report() -> None:
        loop.call_soon_threadsafe(through.set)

    worker_of(table).post(report)
    await through.wait()


async def until_asked(table: SessionRegistry) -> None:
    """The engines, which stand at a gate, have something to do behind it."""
    while not worker_of(table)._calls:
        await asyncio.sleep(0)


async def until_settled(table: SessionRegistry) -> None:
    """No session is being opened or ended."""
    while table._openings or table._ends:
        await asyncio.gather(*table._openings, *table._ends, return_exceptions=True)
        await asyncio.sleep(0)


@pytest.mark.parametrize("error", [MemoryError("an arena"), RuntimeError("a bug of ours")])
def test_a_session_that_cannot_be_made_gives_its_place_back(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engines = FakeBundle(FakeClock())

    async def session(made: Network) -> None:
        engines.language.arena_error = error
        for _ in range(3):
            with pytest.raises(InternalError, match="could not be opened"):
                await Client.connect(URL)
        assert made._table.num_sessions == 0
        engines.language.arena_error = None
        async with await Client.connect(URL, {"delivery": "wait"}) as client:
            await client.send_frame(jpeg(1), 0)
            assert (await client.ask("what colour is the cube ?")).text == ANSWER

    with fake_table(engines, max_sessions=1) as table, network(table) as made:
        run(session(made))
    assert str(error) in caplog.text  # the log says more than the viewer is told


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (worker, "SessionHandle"),
        (EngineWorker, "open_session"),
        (SessionRegistry, "model_part"),  # of the greeting
    ],
)
def test_a_place_comes_back_wherever_the_opening_fails(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    async def session(made: Network) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(InternalError, match="could not be opened"):
                await Client.connect(URL)
        assert made._table.num_sessions == 0
        async with await Client.connect(URL):
            pass

    with fake_table(max_sessions=1) as table, network(table) as made:
        run(session(made))


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_that_opens_while_the_server_drains_does_not_escape(fails: bool) -> None:
    engines = FakeBundle(FakeClock())

    async def case(table: SessionRegistry) -> None:
        gate = Gate(table)
        if fails:
            engines.language.arena_error = ConfigError("does not fit")
        opening = asyncio.create_task(table.open())
        await until_asked(table)
        draining = asyncio.create_task(table.drain(TIMEOUT_S))
        await asyncio.sleep(0)
        gate.open()
        with pytest.raises(ConfigError if fails else ServerBusy):
            await opening
        await draining
        assert table.num_sessions == 0
        await until_engines_are_through(table)
        assert worker_of(table)._scheduler.sessions == []

    with fake_table(engines) as table:
        run(case(table))


def test_a_session_that_has_just_opened_is_closed_by_a_drain() -> None:
    """Its connection has not taken it yet, and must not wait for events that never come."""

    async def case(table: SessionRegistry) -> None:
        session = await table.open()
        await table.drain(TIMEOUT_S)
        assert session.ending is not None
        assert session.ending.code == 1001

    with fake_table() as table:
        run(case(table))


@pytest.mark.parametrize("has_room", [True, False])
def test_who_is_cancelled_while_a_session_opens_leaves_no_place_taken(has_room: bool) -> None:
    """With room: while the engines make it. Without: while an absent viewer's session ends."""

    async def case(table: SessionRegistry) -> None:
        if not has_room:
            away = await table.open()
            table.leave(away)
        gate = Gate(table)
        opening = asyncio.create_task(table.open())
        await until_asked(table)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        gate.open()
        await until_settled(table)
        assert table.num_sessions == 0
        await until_engines_are_through(table)
        assert worker_of(table)._scheduler.sessions == []
        await table.end(await table.open())

    with fake_table(max_sessions=1) as table:
        run(case(table))


def test_nobody_waits_for_engines_that_have_stopped() -> None:
    async def case(table: SessionRegistry) -> None:
        session = await table.open()
        gate = Gate(table)
        opening = asyncio.create_task(table.open())
        await until_asked(table)
        stopping = asyncio.create_task(asyncio.to_thread(worker_of(table).stop))
        while not worker_of(table)._stopping:
            await asyncio.sleep(0)
        gate.open()
        late = await opening  # was asked for in time
        await stopping
        with pytest.raises(ServerBusy, match="stopping"):
            await table.open()
        await table.end(session)
        await table.end(late)
        assert table.num_sessions == 0
        assert worker_of(table)._scheduler.sessions == []

    with fake_table() as table:
        run(case(table))


def test_a_drain_waits_for_the_answer_and_not_for_one_that_a_bug_ended() -> None:
    engines = FakeBundle(FakeClock())

    async def begin(made: Network, question: str) -> ClientSession:
        client = await Client.connect(URL, {"delivery": "wait"}, reconnect=False)
        await client.send_frame(jpeg(1), 0)
        await client.wait_processed()
        gate = Gate(made._table)
        await client.start_answer(question)
        session = made._table._sessions[client.created.session_id]
        while session.messages_received < 3 or session.taking is None or not session.taking.done():
            await asyncio.sleep(0)
        gate.open()
        return session

    async def case(made: Network) -> None:
        good = await begin(made, "what colour is the cube ?")
        bad = await begin(made, "boom")
        await made._table.drain(TIMEOUT_S)
        await made.settle()
        texts = [good.log.text(n) for n in range(good.log.oldest, good.log.newest + 1)]
        assert any('"response.done"' in text and ANSWER in text for text in texts)
        assert '"session.closed"' in texts[-1]
        assert bad.ending is not None
        assert bad.ending.code == 1011

    with_a_bug(engines)
    with fake_table(engines) as table, network(table) as made:
        run(case(made))


def test_an_observer_that_fails_costs_the_viewer_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(session_id: str, event: protocol.ServerEvent) -> None:
        raise RuntimeError("a bug of an observer")

    session = ClientSession(ServerLimits(), fail)
    session.send_all([protocol.Pong(event_id=str(number)) for number in range(3)])
    assert session.log.newest == 3
    assert "a bug of an observer" in caplog.text


def with_a_bug(engines: FakeBundle) -> None:
    """The question "boom" meets it."""
    prompt: Any = engines.prompt

    class Prompt:
        def __getattr__(self, name: str) -> Any:
            return getattr(prompt, name)

        def question_ids(self, text: str) -> Any:
            if text == "boom":
                raise RuntimeError("a bug of ours")
            return prompt.question_ids(text)

    engines.prompt = Prompt()  # type: ignore[assignment]


def test_a_bug_with_many_messages_waiting_closes_the_connection() -> None:
    engines = FakeBundle(FakeClock())
    with_a_bug(engines)

    async def case(made: Network) -> None:
        client = await Client.connect(URL, {"delivery": "wait"}, reconnect=False)
        await client.send_frame(jpeg(1), 0)
        await client.wait_processed()
        gate = Gate(made._table)
        link = made.links[-1]
        for _ in range(2 * MAX_WAITING_CALLS):
            await link.send(protocol.encode(protocol.ResponseCreate(text="boom")))
        (session,) = made._table._sessions.values()
        assert session.handle is not None
        while session.handle.num_waiting <= MAX_WAITING_CALLS:
            await asyncio.sleep(0)
        gate.open()
        await made.settle()
        assert link._closed is not None
        assert link._closed.code == 1011
        await client.close()

    with fake_table(engines) as table, network(table) as made:
        run(case(made))


def test_a_busy_loop_is_woken_once_for_all_that_came(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(_deliveries(monkeypatch))
    assert "could not be delivered" in caplog.text


async def _deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, wakes = asyncio.get_running_loop(), []
    wake = loop.call_soon_threadsafe

    def counted(call: Any, *args: Any) -> Any:
        wakes.append(call)
        return wake(call, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    got: list[protocol.ServerEvent] = []

    def deliver(events: list[protocol.ServerEvent]) -> None:
        got.extend(events)
        if len(got) == 2:
            raise ValueError("a bug")

    deliveries = Deliveries(loop, deliver)
    events: list[protocol.ServerEvent] = [
        protocol.SessionClosed(reason=str(number)) for number in range(9)
    ]

    def engines() -> None:
        for event in events[:8]:
            deliveries.put([event])

    thread = threading.Thread(target=engines)
    thread.start()
    thread.join()  # the loop cannot look meanwhile
    assert len(wakes) == 1
    assert not got
    await asyncio.sleep(0)
    assert got == events[:8]
    deliveries.put(events[8:])
    await asyncio.sleep(0)
    assert got == events
    assert len(wakes) == 2
