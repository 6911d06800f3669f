"""The client: whatever ends it reaches whoever waits, and it keeps nothing that grows."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import (
    ConfigError,
    ProtocolError,
    ServerBusy,
    ServerUnreachable,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client import connection as client_connection
from edge_vlm_runtime.client.client import AnswerStream, Client
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.client.run import Observer, Outcome, PlannedQuestion, stream
from edge_vlm_runtime.client.terminal import LineOutput
from edge_vlm_runtime.protocol.base import UnknownEvent
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.sources.container import Picture
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.scripted_server import DROP_EVERY, NUM_CELLS, scripted
from tests.runtime.client.test_connection import fake_table
from tests.runtime.protocol.memory_link import Break, network
from tests.runtime.server.live import run

URL = "ws://memory/v1/realtime"
WAIT: Settings = {"delivery": "wait"}


class CallbackBug(Exception):
    """Of no type that the client could foresee."""


def raising(error: BaseException, kind: type[protocol.ServerEvent]) -> Callable[[Any], None]:
    def on_event(event: protocol.ServerEvent) -> None:
        if isinstance(event, kind):
            raise error

    return on_event


async def deltas(answer: AnswerStream) -> str:
    return "".join([delta async for delta in answer])


async def iterated(client: Client) -> str:
    return await deltas(await client.start_answer("?"))


CALLS: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "ask": lambda client: client.ask("?"),
    "iteration": iterated,
    "update": lambda client: client.update({"fps_cap": 3.0}),
    "say": lambda client: client.say("?"),
    "alerts": lambda client: client.list_alerts(),
    "send_frame": lambda client: client.send_frame(jpeg(2), 500_000),
    "wait_processed": lambda client: client.wait_processed(),
    "cancel": lambda client: client.cancel(),
}


async def failed_client(error: BaseException) -> Client:
    """Its `on_event` has raised."""
    client = await Client.connect(URL, WAIT, on_event=raising(error, protocol.FrameAccepted))
    await client.send_frame(jpeg(1), 0)
    await asyncio.wait([client._reader])
    return client


@pytest.mark.parametrize("name", CALLS)
def test_the_next_call_raises_what_on_event_raised(name: str) -> None:
    async def session() -> None:
        client = await failed_client(CallbackBug("a bug of the caller's"))
        for _ in range(2):
            with pytest.raises(CallbackBug, match="a bug of the caller's") as caught:
                await CALLS[name](client)
            assert "on_event" in [entry.name for entry in caught.traceback]
        await client.close()  # somebody knows by now
        await client.close()

    with scripted() as servers:
        run(session())
    assert servers[0].is_closed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BrokenPipeError("gone"), BrokenPipeError),
        (ProtocolError("typed"), ProtocolError),
        (StopIteration(), RuntimeError),
        (asyncio.CancelledError(), RuntimeError),  # is not the end of the session
    ],
)
def test_no_exception_of_on_event_leaves_anybody_waiting(
    error: BaseException, expected: type[Exception]
) -> None:
    """The one that waits in the middle of an answer, and the one that asks next."""

    async def session() -> None:
        on_event = raising(error, protocol.ResponseOutputTextDelta)
        client = await Client.connect(URL, on_event=on_event)
        answer = await client.start_answer("?")
        both = await asyncio.gather(deltas(answer), answer.answer(), return_exceptions=True)
        assert [type(found) for found in both] == [expected, expected]
        with pytest.raises(expected):
            await client.wait_processed()
        await client.close()

    with scripted() as servers:
        run(session())
    assert servers[0].is_closed


def test_an_answer_may_be_iterated_by_two_and_again() -> None:
    async def session() -> None:
        async with await Client.connect(URL) as client:
            answer = await client.start_answer("?")
            both = await asyncio.gather(deltas(answer), deltas(answer))
            assert "".join(sorted("".join(both))) == "".join(sorted((await answer.answer()).text))
            assert await deltas(answer) == ""  # each piece comes once

    with scripted():
        run(session())


def test_whoever_waits_for_room_to_send_or_for_an_outcome_is_woken() -> None:
    release = threading.Event()

    def on_event(event: protocol.ServerEvent) -> None:
        if release.is_set():
            raise CallbackBug

    async def session() -> None:
        client = await Client.connect(URL, on_event=on_event)
        client._unacknowledged.update(range(100, 100 + 1000))  # of a server that is behind
        waiting = [
            asyncio.create_task(client.send_frame(jpeg(1), 0)),
            asyncio.create_task(client.wait_processed()),
        ]
        await asyncio.sleep(0)
        release.set()
        servers[0].emit(protocol.SessionGoAway(time_left_s=1.0))
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in found] == [CallbackBug, CallbackBug]
        await client.close()

    with scripted() as servers:
        run(session())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CallbackBug("unseen"), CallbackBug),
        (ConfigError("unseen"), ConfigError),  # of a type that a session may end with, too
        (asyncio.CancelledError("unseen"), RuntimeError),
    ],
)
def test_close_says_what_on_event_raised(error: BaseException, expected: type[Exception]) -> None:
    async def session() -> None:
        client = await failed_client(error)
        with pytest.raises(expected) as caught:
            await client.close()
        assert error in (caught.value, caught.value.__cause__)
        await client.close()

    with scripted():
        run(session())


def test_close_says_what_nobody_has_been_told() -> None:
    async def session() -> None:
        with pytest.raises(CallbackBug):
            async with await failed_client(CallbackBug()):
                pass
        with pytest.raises(KeyError):  # what the body raises is not hidden
            async with await failed_client(CallbackBug()):
                raise KeyError

    with scripted() as servers:
        run(session())
    assert [server.is_closed for server in servers] == [True] * 2


def test_an_on_event_that_raises_at_the_greeting_leaves_no_connection() -> None:
    async def session() -> None:
        with pytest.raises(CallbackBug):
            await Client.connect(URL, on_event=raising(CallbackBug(), protocol.SessionCreated))

    with scripted() as servers:
        run(session())
    assert servers[0].is_closed


def test_a_bug_of_the_reader_is_handed_over() -> None:
    async def session() -> None:
        client = await Client.connect(URL)

        def confirm(event: protocol.ServerEvent) -> None:
            raise ZeroDivisionError("a bug of ours")

        client._line._confirm = confirm  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError, match="a bug of ours"):
            await client.ask("?")
        await client.close()

    with scripted():
        run(session())


def test_closing_wakes_those_who_wait() -> None:
    """Also when the server says nothing any more."""

    async def session() -> None:
        client = await Client.connect(URL)
        asking = asyncio.create_task(client.list_alerts())  # the script knows no alerts
        await asyncio.sleep(0)
        client._reader.cancel()
        await client.close()
        with pytest.raises(ServerUnreachable, match="closed"):
            await asking

    with scripted():
        run(session())


def test_one_who_gives_up_waiting_takes_the_answer_from_nobody() -> None:
    async def session() -> None:
        client = await Client.connect(URL)
        answer = await client.start_answer("?")
        first = asyncio.create_task(answer.answer())
        await asyncio.sleep(0)
        first.cancel()
        assert (await answer.answer()).text == "a ball"
        await client.close()

    with scripted():
        run(session())


# ---- a newer server --------------------------------------------------------------------------


def test_an_unknown_type_of_event_is_counted_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    def script(number: int) -> None:
        servers[0].emit_unknown("memory.compacted", tokens=number)

    events: list[protocol.ServerEvent] = []

    async def session() -> None:
        async with await Client.connect(URL, on_event=events.append) as client:
            for number in range(3):
                await client.send_frame(jpeg(1), number)
            await client.wait_processed()
            assert (await client.ask("?")).text == "a ball"
            assert client.unknown_events == {"memory.compacted": 3}

    with scripted(script) as servers, caplog.at_level(logging.WARNING):
        run(session())
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    unknown = [event for event in events if isinstance(event, UnknownEvent)]
    assert [(event.name, event.fields["tokens"]) for event in unknown] == [
        ("memory.compacted", number) for number in (1, 2, 3)
    ]
    assert caplog.text.count("memory.compacted") == 1


@pytest.mark.parametrize("text", ['{"type": "new", "sequence": "x"}', '{"type": 3}', "{"])
def test_what_is_no_event_at_all_still_is_an_error(text: str) -> None:
    async def session() -> None:
        async with await Client.connect(URL) as client:
            servers[0].emit_text(text)
            with pytest.raises(ProtocolError):
                await client.list_alerts()

    with scripted() as servers:
        run(session())


# ---- coming back -----------------------------------------------------------------------------


def test_a_busy_server_is_tried_again_within_the_grace_time() -> None:
    """It lets us in a moment later: the places were taken by connections about to end."""
    refusals = 3

    async def session() -> None:
        real = client_connection._connect

        async def connect(url: str, access: Access) -> Any:
            nonlocal refusals
            link: Any = await real(url, access)
            if "resume" in url and refusals:
                refusals -= 1
                error = protocol.error_event(ServerBusy("no free connection"))
                link._down.put_nowait(protocol.encode(error))
            return link

        with pytest.MonkeyPatch.context() as patch:  # undone before `network` undoes its own
            patch.setattr(client_connection, "_connect", connect)
            async with await Client.connect(URL, WAIT) as client:
                await client.send_frame(jpeg(1), 0)
                await client.wait_processed()
                made.links[0].cut()
                assert (await client.ask("?")).status == "completed"
                assert client.reconnects == 1

    with fake_table() as table, network(table, [Break(1 << 30, 1 << 30, True)]) as made:
        run(session())
    assert refusals == 0


# ---- streaming a source ----------------------------------------------------------------------


class Pictures:
    """A source of small pictures; silent for ever after the last one if it is live."""

    name = "pictures"
    max_side: int | None = None

    def __init__(self, count: int, is_live: bool = False) -> None:
        self.is_live = is_live
        self.counts: Counter[str] = Counter()
        self._count = count
        self._closed = threading.Event()

    def pictures(self) -> Iterator[Picture]:
        rgb = np.zeros((2, 2, 3), np.uint8)
        for number in range(self._count):
            yield Picture(rgb=rgb, time_s=number * 0.5)
        if self.is_live:
            self._closed.wait()

    def close(self) -> None:
        self._closed.set()


def test_a_silent_camera_does_not_hold_up_what_went_wrong() -> None:
    async def session() -> None:
        on_event = raising(CallbackBug(), protocol.SessionGoAway)
        async with await Client.connect(URL, on_event=on_event) as client:
            source = Pictures(1, is_live=True)

            class View(Observer):
                def sent(self, sequence: int, picture: Picture) -> None:
                    servers[0].emit(protocol.SessionGoAway(time_left_s=1.0))

            with pytest.raises(CallbackBug):
                await stream(source, client, [], real_time=True, observer=View())

    with scripted() as servers:
        run(session())


@pytest.mark.parametrize("method", ["delta", "answered"])
@pytest.mark.parametrize("at_s", [0.5, None])
def test_a_view_that_fails_ends_the_stream(method: str, at_s: float | None) -> None:
    def fail(*args: object) -> None:
        raise CallbackBug(method)

    async def session() -> None:
        async with await Client.connect(URL) as client:
            view = Observer()
            setattr(view, method, fail)
            questions = [PlannedQuestion(text="?", at_s=at_s)]
            source = Pictures(20, is_live=at_s is not None)
            with pytest.raises(CallbackBug, match=method):
                await stream(source, client, questions, real_time=False, observer=view)

    with scripted():
        run(session())


FRAMES, BOUND = 20_000, 50_000


def test_a_long_watch_has_flat_memory() -> None:
    """Frames, drops, errors that nobody waits for, and a question every ten pictures."""

    class Nowhere:
        def write(self, text: str) -> None: ...

        def flush(self) -> None: ...

    class Soak(LineOutput):
        def sent(self, sequence: int, picture: Picture) -> None:
            if sequence == 9 * FRAMES // 10:
                gc.collect()
                tracemalloc.start()

    def script(number: int) -> None:
        if number % 10 == 1:
            detail = protocol.ErrorDetail(type="server_error", code="E-ENGINE", message="m" * 100)
            servers[0].emit(protocol.Error(error=detail))

    async def session() -> int:
        asyncio.get_running_loop().set_debug(False)  # it keeps a stack for every handle
        outcome = Outcome()
        async with await Client.connect(URL) as client:
            view = Soak(9, Nowhere())  # type: ignore[arg-type]
            client.on_event = view.event
            question = PlannedQuestion(text="is there a ball?", at_s=0.0, every_s=5.0)
            source = Pictures(FRAMES)
            await stream(
                source, client, [question], real_time=False, observer=view, outcome=outcome
            )
            gc.collect()
            grown, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        num_dropped = FRAMES // DROP_EVERY
        assert outcome.frames_sent == FRAMES
        assert outcome.frames_processed == FRAMES - num_dropped
        assert outcome.dropped == {"busy": num_dropped}
        assert outcome.cells_seen == NUM_CELLS * outcome.frames_processed
        assert outcome.questions == outcome.answers == FRAMES // 10 + 1
        return grown

    logging.getLogger("edge_vlm_runtime").setLevel(logging.ERROR)
    try:
        with scripted(script) as servers:
            # Without the limit of `run`: so many frames take a busy machine minutes.
            assert asyncio.run(session()) < BOUND
    finally:
        logging.getLogger("edge_vlm_runtime").setLevel(logging.NOTSET)
