"""Questions over HTTP to a stream that somebody else watches: what its viewer is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from edge_vlm.errors import TooManyQuestions
from edge_vlm_runtime import Client, connect, protocol
from edge_vlm_runtime.protocol.alerts import AlertListed
from edge_vlm_runtime.server.app import Server
from tests.openai.served import TIMEOUT_S, HeldAnswers, clip_frames, serving
from tests.runtime.server.live import run

QUESTION = "What is there now?"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_queued_questions=4) as running:
        yield running


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldAnswers]:
    answers = HeldAnswers(monkeypatch)
    yield answers
    answers.let_go()


async def viewer_of(server: Server, events: list[protocol.ServerEvent]) -> Client:
    client = await connect(server.url, {"delivery": "wait"}, on_event=events.append)
    await client.send_frame(clip_frames()[0], 0)
    await client.wait_processed()
    return client


def asking(http: httpx.AsyncClient, client: Client, text: str = QUESTION) -> asyncio.Task[Any]:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "edge_vlm": {"session": client.created.session_id},
    }
    return asyncio.create_task(http.post("/v1/chat/completions", json=body))


async def until(is_met: Any) -> None:
    async def look() -> None:
        while not is_met():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), TIMEOUT_S)


def number_of(events: list[protocol.ServerEvent], kind: type[protocol.ServerEvent]) -> int:
    return sum(isinstance(event, kind) for event in events)


def test_a_viewer_is_not_told_of_a_strangers_refusals(server: Server, held: HeldAnswers) -> None:
    async def scenario() -> None:
        events: list[protocol.ServerEvent] = []
        client = await viewer_of(server, events)
        async with client, httpx.AsyncClient(base_url=server.page_url, timeout=TIMEOUT_S) as http:
            answers = [await client.start_answer(QUESTION)]
            await until(lambda: number_of(events, protocol.ResponseCreated) == 1)
            waiting = [asking(http, client), asking(http, client)]
            await until(lambda: server._api._live._waiting.total() == 2)
            third = await asking(http, client)
            assert third.status_code == 429  # half of the places are the viewer's
            assert third.headers["Retry-After"] == "1"
            answers += [await client.start_answer(QUESTION) for _ in range(2)]
            with pytest.raises(TooManyQuestions):
                await client.ask(QUESTION)
            held.let_go()
            live = f"/v1/edge_vlm/sessions/{client.created.session_id}/alerts"
            assert (await http.get(live)).json() == {"alerts": []}
            refused = await http.post(live, json={"question": "x " * 5000})
            assert refused.status_code == 400
            assert [(await answer.answer()).status for answer in answers] == ["completed"] * 3
            assert [(await task).status_code for task in waiting] == [200, 200]
            assert await client.list_alerts() == []
            assert number_of(events, protocol.Error) == 1  # the viewer's own
            assert number_of(events, AlertListed) == 1
            assert (await asking(http, client)).status_code == 200  # the places are free again

    run(scenario())


def test_a_question_that_was_left_while_it_waited_is_not_decoded(
    server: Server, held: HeldAnswers
) -> None:
    async def scenario() -> None:
        events: list[protocol.ServerEvent] = []
        client = await viewer_of(server, events)
        async with client, httpx.AsyncClient(base_url=server.page_url, timeout=TIMEOUT_S) as http:
            first = await client.start_answer(QUESTION)
            await until(lambda: number_of(events, protocol.ResponseCreated) == 1)
            left = [asking(http, client), asking(http, client)]
            await until(lambda: server._api._live._waiting.total() == 2)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await until(lambda: not server._api._work)  # the server knows
            assert first.response_id is not None
            held.let_go(first.response_id)  # the server may be late to cancel the others
            assert (await first.answer()).status == "completed"
            await until(lambda: number_of(events, protocol.ResponseDone) == 3)
            done = [event for event in events if isinstance(event, protocol.ResponseDone)]
            assert [event.status for event in done] == ["completed", "cancelled", "cancelled"]
            assert not server._api._live._waiting

    run(scenario())
