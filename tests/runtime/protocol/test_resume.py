"""Wherever a connection breaks, and however often: nothing is lost and nothing said twice.

The real client, connections, sessions and engine thread, over connections in memory that break at
chosen messages. Engines without a model, so that an example takes milliseconds.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_vlm.errors import (
    EdgeVlmError,
    ProtocolError,
    ReplayLost,
    ServerBusy,
    ServerUnreachable,
    SessionGone,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import AnswerStream, Client
from edge_vlm_runtime.client.connection import Access, ResumePoint
from edge_vlm_runtime.protocol.typed import Settings
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.seen import Seen
from tests.runtime.client.test_connection import fake_table
from tests.runtime.protocol.memory_link import NEVER, Break, MemoryLink, Network, network
from tests.runtime.server.live import run
from tests.runtime.server.test_sessions import Gate
from tests.runtime.session.fake_engines import ANSWER

Event = TypeVar("Event", bound=protocol.ServerEvent)
URL = "ws://memory/v1/realtime"
FRAMES, QUESTIONS = 6, 3
BREAKS = st.lists(
    st.builds(Break, st.integers(0, 12), st.integers(0, 40), st.booleans()), max_size=6
)


def of(events: Sequence[protocol.ServerEvent], kind: type[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


async def talk(client: Client) -> list[str]:
    """Frames, and questions while they come; the texts of the answers."""
    await client.update({"delivery": "wait", "max_answer_tokens": 8})
    streams = []
    for number in range(1, FRAMES + 1):
        await client.send_frame(jpeg(number), number * 500_000)
        if number % 2 == 0:
            await client.wait_processed()
            streams.append(await client.start_answer("what colour is the cube ?"))
    await client.wait_processed()
    return [await text_of(stream) for stream in streams]


async def text_of(stream: AnswerStream) -> str:
    return "".join([delta async for delta in stream])


def conversation(breaks: Sequence[Break]) -> tuple[list[protocol.ServerEvent], list[str], int]:
    """Events in the order the client took them, answers, and how often the connection broke."""
    events: list[protocol.ServerEvent] = []

    async def session(made: Network) -> tuple[list[str], int]:
        client = await Client.connect(URL, on_event=events.append)
        texts = await talk(client)
        await client.close()
        await made.settle()
        return texts, client.reconnects

    with fake_table() as table, network(table, breaks) as made:
        texts, reconnects = run(session(made))
        assert table.num_sessions == 0
        on_the_wire = [json.loads(text)["sequence"] for link in made.links for text in link.arrived]
        numbers = [number for number in on_the_wire if number]
        assert numbers == list(range(1, len(numbers) + 1))
    return events, texts, reconnects


def what_was_said(events: Sequence[protocol.ServerEvent]) -> dict[str, Any]:
    """What must not depend on the network."""
    return {
        "frames": [
            (event.frame_sequence, event.time_s, tuple(event.kept_cells))
            for event in of(events, protocol.FrameAccepted)
        ],
        "dropped": [event.frame_sequence for event in of(events, protocol.FrameDropped)],
        "answers": [
            (event.response_id, event.text, event.status, event.usage.output_tokens)
            for event in of(events, protocol.ResponseDone)
        ],
        "updates": len(of(events, protocol.SessionUpdated)),
        "errors": [event.error.code for event in of(events, protocol.Error)],
    }


@functools.cache
def unbroken() -> dict[str, Any]:
    events, _, reconnects = conversation([])
    assert reconnects == 0
    return what_was_said(events)


@settings(max_examples=80)
@given(BREAKS)
@example([])
@example([Break(1 << 30, down, True) for down in (1, 4, 9, 16, 25)])
@example([Break(up, 1 << 30, True) for up in (1, 2, 3, 1, 0, 2)])
@example([Break(3, 5, True), Break(0, 0, True), Break(5, 0, False), Break(1 << 30, 20, True)])
def test_a_broken_conversation_says_what_an_unbroken_one_says(breaks: list[Break]) -> None:
    if breaks and breaks[0].down == 0:  # it never began: there is nothing to go on with
        breaks[0] = Break(breaks[0].up, 1, False)
    events, texts, _ = conversation(breaks)
    numbered = [event.sequence for event in events if event.sequence]
    assert numbered == list(range(1, len(numbered) + 1))
    assert isinstance(events[-1], protocol.SessionClosed)
    assert what_was_said(events) == unbroken()
    # by hand, so that both being wrong alike is seen too
    said = what_was_said(events)
    assert [number for number, _, _ in said["frames"]] == list(range(1, FRAMES + 1))
    assert said["dropped"] == said["errors"] == []
    assert said["updates"] == 1
    assert [text for _, text, _, _ in said["answers"]] == texts == [ANSWER] * QUESTIONS
    deltas: Counter[str] = Counter()
    for event in of(events, protocol.ResponseOutputTextDelta):
        deltas[event.response_id] += len(event.delta)
    assert set(deltas.values()) == {len(ANSWER)}


def test_breaks_do_happen() -> None:
    """The property above would be empty if the links never broke."""
    events, _, reconnects = conversation([Break(1 << 30, 6, True), Break(2, 1 << 30, False)])
    assert reconnects == 2
    assert max(event.sequence for event in events) > 20


def test_another_process_goes_on_in_the_middle_of_an_answer() -> None:
    """The client dies behind any event; one that knows only its resume point reads the rest."""
    whole, _, _ = conversation([])
    for killed_at in range(1, len(whole), 3):
        events: list[protocol.ServerEvent] = []

        async def session(
            made: Network, killed_at: int, events: list[protocol.ServerEvent]
        ) -> None:
            first = await Client.connect(URL, on_event=events.append, reconnect=False)
            talking = asyncio.create_task(talk(first))
            while len(events) < killed_at:
                await asyncio.sleep(0)
            first.on_event = None
            point = ResumePoint(
                session_id=first.resume_point.session_id,
                resume_token=first.resume_point.resume_token,
                last_sequence=killed_at,
            )
            del events[killed_at:]  # died before it had seen them
            made.links[0].cut()
            await asyncio.gather(talking, return_exceptions=True)
            await first.close()
            second = await Client.resume(URL, point, on_event=events.append)
            await second.update({"delivery": "wait"})  # the first may have died before it said so
            sent = await second.send_frame(jpeg(30), 9_000_000)
            assert sent == (second.created.newest_frame_sequence or 0) + 1  # type: ignore[union-attr]
            await second.wait_processed()
            answer = await second.ask("what colour is the cube ?")
            assert (answer.text, answer.newest_frame.frame_sequence) == (ANSWER, sent)
            await second.close()

        with fake_table() as table, network(table) as made:
            run(session(made, killed_at, events))
        numbered = [event.sequence for event in events if event.sequence]
        assert numbered == list(range(1, len(numbered) + 1))
        created = [event.response_id for event in of(events, protocol.ResponseCreated)]
        done = of(events, protocol.ResponseDone)
        assert [event.response_id for event in done] == created
        assert {event.text for event in done} == {ANSWER}
        outcomes = [event.frame_sequence for event in of(events, protocol.FrameAccepted)]
        assert outcomes == sorted(set(outcomes))


# ---- who may not go on -----------------------------------------------------------------------


async def left_behind(made: Network) -> ResumePoint:
    """A session whose client is gone."""
    client = await Client.connect(URL, {"delivery": "wait"}, reconnect=False)
    await client.send_frame(jpeg(1), 0)
    await client.wait_processed()
    point = client.resume_point
    made.links[-1].cut()
    await made.settle()
    await client.close()
    return point


def refused(point: ResumePoint, **changes: Any) -> Any:
    fields = {
        "session_id": point.session_id,
        "resume_token": point.resume_token,
        "last_sequence": point.last_sequence,
        **changes,
    }
    return Client.resume(URL, ResumePoint(**fields))


def test_unknown_names_wrong_tokens_and_impossible_numbers() -> None:
    async def session(made: Network) -> None:
        point = await left_behind(made)
        for changes, kind in (
            ({"session_id": "0123456789abcdef"}, SessionGone),
            ({"resume_token": "x" * 32}, SessionGone),
            ({"resume_token": ""}, SessionGone),
            ({"session_id": "", "resume_token": ""}, SessionGone),
            ({"last_sequence": point.last_sequence + 100}, ProtocolError),
            ({"last_sequence": -1}, ProtocolError),
        ):
            with pytest.raises(kind):
                await refused(point, **changes)
        again = await refused(point)  # none of that did the session any harm
        assert (await again.ask("what colour is the cube ?")).text == ANSWER
        await again.close()
        with pytest.raises(SessionGone):
            await refused(point)

    with fake_table() as table, network(table) as made:
        run(session(made))
        assert table.num_sessions == 0


def test_a_session_is_not_kept_for_ever() -> None:
    async def session(made: Network, grace_s: float) -> None:
        point = await left_behind(made)
        await asyncio.sleep(grace_s)
        while made._table.num_sessions:
            await asyncio.sleep(0.01)
        with pytest.raises(SessionGone):
            await refused(point)

    for grace_s in (0.0, 0.05):
        with fake_table(resume_grace_s=grace_s) as table, network(table) as made:
            run(session(made, grace_s))


def test_what_was_said_meanwhile_is_bounded() -> None:
    async def session(made: Network) -> None:
        client = await Client.connect(URL, {"delivery": "wait"}, reconnect=False)
        await client.send_frame(jpeg(1), 0)
        await client.wait_processed()
        point = client.resume_point
        gate = Gate(made._table)  # the answers come when the viewer is known to be away
        for _ in range(4):
            await client.start_answer("what colour is the cube ?")
        await asyncio.sleep(0)
        made.links[-1].cut()
        await made.settle()
        await client.close()
        (served,) = made._table._sessions.values()
        assert served.is_away
        gate.open()
        assert served.handle is not None
        loop = asyncio.get_running_loop()
        idle = asyncio.Event()

        def report() -> None:
            loop.call_soon_threadsafe(idle.set)

        served.handle.when_idle(report)
        await idle.wait()
        assert served.log.newest >= 30
        assert served.log.newest - served.log.oldest + 1 == 12
        with pytest.raises(ReplayLost, match="no longer kept"):
            await refused(point)

    with fake_table(max_replay_events=12) as table, network(table) as made:
        run(session(made))


def test_the_longest_absent_viewer_makes_room_for_a_new_one() -> None:
    async def session(made: Network) -> None:
        first, second = await left_behind(made), await left_behind(made)
        present = await Client.connect(URL)
        with pytest.raises(SessionGone):
            await refused(first)
        back = await refused(second)
        with pytest.raises(ServerBusy):
            await Client.connect(URL)
        for client in (present, back):
            await client.close()

    with fake_table(max_sessions=2) as table, network(table) as made:
        run(session(made))


def test_who_comes_back_takes_the_session_from_a_connection_that_hangs() -> None:
    """The old one is still open as far as the server knows."""

    async def session(made: Network) -> None:
        old = await Client.connect(URL, {"delivery": "wait"})
        await old.send_frame(jpeg(1), 0)
        await old.wait_processed()
        new = await refused(old.resume_point)
        with pytest.raises(ServerUnreachable, match="1008"):
            while True:
                await old.send_frame(jpeg(2), 500_000)
                await asyncio.sleep(0.001)
        assert (await new.ask("what colour is the cube ?")).text == ANSWER
        await old.close()
        await new.close()

    with fake_table() as table, network(table) as made:
        run(session(made))


@pytest.mark.parametrize("server_notices", [True, False])
def test_a_message_that_waits_when_the_connection_breaks_is_taken(server_notices: bool) -> None:
    """It counts as received, so the client does not send it again."""
    events: list[protocol.ServerEvent] = []
    picture = {
        "type": "input_image",
        "image_url": f"data:image/jpeg;base64,{base64.b64encode(jpeg(1)).decode()}",
    }
    item = {"type": "message", "role": "user", "content": [picture]}

    async def case(made: Network) -> None:
        settings: Settings = {"delivery": "wait"}
        async with await Client.connect(URL, settings, on_event=events.append) as client:
            gate = Gate(made._table)
            await client._send_json("conversation.item.create", "i", item=item)
            stream = await client.start_answer("what colour is the cube ?")
            (session,) = made._table._sessions.values()
            while session.messages_received < 3:  # the question waits for the picture
                await asyncio.sleep(0)
            link, taking = made.links[-1], session.taking
            if server_notices:
                link.cut()
                session.send(protocol.Pong())
            else:
                link.cut_for_client()
            await made.served(link)  # another connection goes on with the session, or is about to
            assert taking is not None
            assert not taking.done()
            gate.open()
            assert await text_of(stream) == ANSWER

    with fake_table() as table, network(table) as made:
        run(case(made))
    assert len(of(events, protocol.ResponseDone)) == 1


def test_the_first_message_must_say_which_session() -> None:
    async def first_answer(made: Network, text: str) -> protocol.Error:
        link: MemoryLink = await made.connect(f"{URL}?resume=1", Access())
        await link.send(text)
        event = protocol.decode_server_event(await link.recv())
        assert isinstance(event, protocol.Error)
        with pytest.raises(Exception, match="1008"):
            await link.recv()
        return event

    async def session(made: Network) -> None:
        half = '{"type": "session.resume", "session_id": "\\ud800", "resume_token": "", '
        for text in (
            *('{"type": "ping"}', "garbage", "", '{"type": "session.resume"}'),
            half + '"last_sequence": 0}',
        ):
            event = await first_answer(made, text)
            assert event.error.code == "E-PROTOCOL"
        seen = Seen()
        client = await Client.connect(URL, on_event=seen)
        await client._send_json("session.resume", "r", session_id="", resume_token="")
        while not seen.errors:
            await asyncio.sleep(0)
        assert seen.errors[0].code == "E-PROTOCOL"
        await client._send_json(
            "session.resume", "s", session_id="", resume_token="", last_sequence=0
        )
        while len(seen.errors) < 2:
            await asyncio.sleep(0)
        assert "first message" in seen.errors[1].message
        await client.close()

    with fake_table() as table, network(table) as made:
        run(session(made))


def test_a_server_that_stops_ends_the_absent_too() -> None:
    async def session(made: Network) -> None:
        point = await left_behind(made)
        await made._table.drain(5.0)
        assert made._table.num_sessions == 0
        with pytest.raises(EdgeVlmError):
            await refused(point)

    with fake_table() as table, network(table, [NEVER]) as made:
        run(session(made))
