"""A real server with the real tiny model, and TCP connections that are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from edge_vlm.errors import ServerUnreachable, SessionGone
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Answer, Client
from edge_vlm_runtime.protocol import alerts as alert_messages
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.cutting_proxy import CuttingProxy
from tests.runtime.client.seen import Seen
from tests.runtime.server.live import TIMEOUT_S, open_server, run

SETTINGS: Settings = {"delivery": "wait", "max_answer_tokens": 40}
QUESTION = "is there a red ball ?"
FRAMES = 8


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(resume_grace_s=TIMEOUT_S) as running:
        running.start()
        yield running


async def watch(client: Client) -> list[Answer]:
    """Frames, an alert that begins at once, and an answer every other frame."""
    await client._send_json("alert.create", "alert", question=QUESTION, on_threshold=1e-6,
                            off_threshold=1e-7)  # fmt: skip
    answers = []
    for number in range(FRAMES):
        await client.send_frame(jpeg(number), number * 500_000)
        await client.wait_processed()
        if number % 2:
            answers.append(await client.ask(QUESTION))
    return answers


def said(events: list[protocol.ServerEvent]) -> list[tuple[Any, ...]]:
    """What the viewer was told, times and the order of gauges apart."""
    told: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, protocol.FrameAccepted):
            told.append((event.frame_sequence, tuple(event.kept_cells), event.kv_tokens))
        elif isinstance(event, protocol.ResponseOutputTextDelta):
            told.append((event.response_id, event.delta))
        elif isinstance(event, protocol.ResponseDone):
            told.append((event.response_id, event.text, event.status))
        elif isinstance(event, alert_messages.AlertTriggered):
            told.append((event.alert_id, event.episode, event.frame_sequence))
    return told


def whole(events: list[protocol.ServerEvent]) -> bool:
    numbers = [event.sequence for event in events if event.sequence]
    return numbers == list(range(1, len(numbers) + 1))


def test_cut_anywhere_a_session_says_what_it_says_over_a_good_line(server: Server) -> None:
    async def session(budgets: list[int]) -> tuple[list[protocol.ServerEvent], int, int]:
        events: list[protocol.ServerEvent] = []
        async with (
            CuttingProxy(server.port, budgets) as proxy,
            await Client.connect(proxy.url, SETTINGS, on_event=events.append) as client,
        ):
            answers = await watch(client)
            assert all(answer.status == "completed" for answer in answers)
            return events, client.reconnects, proxy.num_cut

    good, reconnects, _ = run(session([]))
    assert reconnects == 0
    assert whole(good)
    expected = said(good)
    assert len([line for line in expected if isinstance(line[0], int)]) == FRAMES
    assert any(isinstance(event, alert_messages.AlertTriggered) for event in good)
    # handshake and session.resumed alone are about 3 kB, so the small ones cut before or inside
    events, reconnects, num_cut = run(session([6000, 100, 1500, 4000, 3200, 4500, 7001, 3900]))
    assert num_cut >= 6
    assert 0 < reconnects <= num_cut
    assert whole(events)
    assert said(events) == expected


def test_a_client_that_dies_in_the_middle_of_an_answer_is_followed_by_another(
    server: Server,
) -> None:
    async def session() -> None:
        events: list[protocol.ServerEvent] = []
        first = await Client.connect(server.url, SETTINGS, on_event=events.append, reconnect=False)
        await first.send_frame(jpeg(1), 0)
        await first.wait_processed()
        await first.start_answer(QUESTION)
        while not any(isinstance(event, protocol.ResponseOutputTextDelta) for event in events):
            await asyncio.sleep(0)
        point = first.resume_point
        del events[point.last_sequence :]
        first.on_event = None
        first._line._connection.transport.abort()
        second = await Client.resume(server.url, point, on_event=events.append)
        while not any(isinstance(event, protocol.ResponseDone) for event in events):
            await asyncio.sleep(0.005)
        await second.close()
        assert whole(events)
        deltas = [e.delta for e in events if isinstance(e, protocol.ResponseOutputTextDelta)]
        (done,) = [event for event in events if isinstance(event, protocol.ResponseDone)]
        assert "".join(deltas) == done.text
        assert done.status == "completed"
        await first.close()

    run(session())


def test_a_line_that_is_down_for_a_while(server: Server) -> None:
    """Frames and a question wait on the client's side and arrive once."""

    async def session() -> None:
        seen = Seen()
        async with (
            CuttingProxy(server.port) as proxy,
            await Client.connect(proxy.url, SETTINGS, on_event=seen) as client,
        ):
            await client.send_frame(jpeg(1), 0)
            await client.wait_processed()
            proxy.is_down = True
            proxy.cut()
            await client.send_frame(jpeg(2), 500_000)
            answer = await client.start_answer(QUESTION)
            await asyncio.sleep(0.5)
            assert not seen.accepted.get(2)
            proxy.is_down = False
            assert (await answer.answer()).status == "completed"
            await client.wait_processed()
            assert sorted(seen.accepted) == [1, 2]
            assert not seen.dropped
            assert client.reconnects == 1

    run(session())


def test_a_server_that_is_gone_and_a_session_that_is_gone(server: Server) -> None:
    async def session() -> None:
        async with CuttingProxy(server.port) as proxy:
            client = await Client.connect(proxy.url, SETTINGS)
            point = client.resume_point
            client._line._reconnect_s = 0.3
            proxy.is_down = True
            proxy.cut()
            with pytest.raises(ServerUnreachable, match="broke"):
                await client.ask(QUESTION)
            await client.close()
            other = await Client.resume(server.url, point)  # it was kept on the server
            await other.close()
            with pytest.raises(SessionGone):
                await Client.resume(server.url, point)

    run(session())
