"""OpenAI's own SDK holds a conversation over the websocket, and its types take every event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import websockets

from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.server.app import Server
from tests.openai.letters import letters_bundle
from tests.openai.served import (
    TIMEOUT_S,
    HeldAnswers,
    client_of,
    clip_frames,
    data_uri,
    next_event,
    png,
    serving,
)
from tests.runtime.cameras.pictures import jpeg, picture

if TYPE_CHECKING:
    from pydantic import TypeAdapter

OURS = {
    "frame.accepted",
    "frame.dropped",
    "session.stats",
    "memory.evicted",
    "memory.rebased",
    "pong",
}
"""Events that OpenAI's API does not have."""
QUESTION = "What is there now?"
TRUTH = "orange mushroom, yellow bicycle, green dog, purple balloon"
KEY = "correct horse"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # A live picture that the engines come to late is dropped: not here, however busy they are.
    with serving(api_key=KEY, settings={"max_frame_age_s": TIMEOUT_S}) as running:
        yield running


class Talk:
    """A connection of the SDK whose every event is checked against its types."""

    def __init__(self, connection: Any) -> None:
        self.sdk = connection
        self.seen: list[Any] = []

    async def until(self, kind: str) -> Any:
        """The next event of this type."""
        while True:
            raw = await self.sdk.recv_bytes()
            event = self.sdk.parse_event(raw)
            if event.type not in OURS:
                events().validate_json(raw)
            assert json.loads(raw)["event_id"]
            self.seen.append(event)
            if event.type == kind:
                return event
            assert event.type != "error", raw

    async def show(self, data: bytes, at_s: float | None = None, kind: str = "image/jpeg") -> None:
        part: dict[str, Any] = {"type": "input_image", "image_url": data_uri(data, kind)}
        if at_s is not None:
            part["capture_time_us"] = round(at_s * 1e6)
        await self.sdk.conversation.item.create(
            item={"type": "message", "role": "user", "content": [part]}
        )

    async def say(self, text: str) -> None:
        part = {"type": "input_text", "text": text}
        await self.sdk.conversation.item.create(
            item={"type": "message", "role": "user", "content": [part]}
        )

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.seen if event.type == kind]


@lru_cache(maxsize=1)
def events() -> TypeAdapter[Any]:
    from openai.types.realtime import RealtimeServerEvent
    from pydantic import TypeAdapter

    return TypeAdapter(RealtimeServerEvent)


@asynccontextmanager
async def talking(server: Server, model: str = "demo") -> AsyncIterator[Talk]:
    import openai

    async with (
        openai.AsyncOpenAI(
            base_url=f"{server.page_url}v1",
            websocket_base_url=server.url.removesuffix("/realtime"),
            api_key=KEY,
        ) as client,
        client.realtime.connect(model=model) as connection,
    ):
        yield Talk(connection)


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


def test_a_conversation_about_a_clip_that_is_sent_as_pictures(server: Server) -> None:
    """The answers of a live session that is sent the same frames at the same times."""

    async def talk() -> None:
        async with talking(server) as it:
            created = await it.until("session.created")
            assert (created.session.type, created.session.model) == ("realtime", "demo")
            await it.sdk.session.update(
                session={"type": "realtime", "output_modalities": ["text"], "instructions": ""}
            )
            updated = await it.until("session.updated")
            assert updated.session.output_modalities == ["text"]
            for number, frame in enumerate(clip_frames()[:11]):
                await it.show(frame, number * 0.5)
            await it.say(QUESTION)
            await it.sdk.response.create(response={"metadata": {"who": "me"}})
            done = await it.until("response.done")
            text = done.response.output[0].content[0].text
            assert text == TRUTH
            assert "".join(event.delta for event in it.of("response.output_text.delta")) == text
            assert it.of("response.output_text.done")[0].text == text
            assert done.response.metadata == {"who": "me"}
            assert done.response.status == "completed"
            usage = done.response.usage
            assert usage.total_tokens == usage.input_tokens + usage.output_tokens
            assert usage.input_token_details.image_tokens > 100
            order = [e.type for e in it.seen if e.type.startswith("response.")]
            assert order[:3] == [
                *("response.created", "response.output_item.added", "response.content_part.added"),
            ]
            assert order[-4:] == [
                *("response.output_text.done", "response.content_part.done"),
                *("response.output_item.done", "response.done"),
            ]
            items = [e.item.id for e in it.of("conversation.item.done")]
            assert items == [e.item.id for e in it.of("conversation.item.added")]
            assert len(items) == len(set(items)) == 13  # pictures, the question, the answer
            accepted = [e.frame_sequence for e in it.of("frame.accepted")]
            assert accepted == list(range(1, 12))  # in a live session, and none was dropped
            await it.say("How many things are there now?")
            await it.sdk.response.create()
            second = await it.until("response.done")
            assert second.response.output[0].content[0].text == "4"
            assert second.response.id != done.response.id

    run(talk())


def test_known_fields_are_taken_and_what_is_in_force_is_said(server: Server) -> None:
    async def talk() -> None:
        async with talking(server) as it:
            await it.until("session.created")
            await it.sdk.session.update(
                session={
                    "type": "realtime",
                    "model": "gpt-realtime",
                    "output_modalities": ["audio"],
                    "instructions": "Is it?",
                    "max_output_tokens": 7,
                    "audio": {"output": {"voice": "marin"}},
                    "tools": [{"type": "function", "name": "f", "parameters": {}}],
                    "tool_choice": "auto",
                    "truncation": "auto",
                    "tracing": None,
                    "temperature": 0.5,
                    "edge_vlm": {"keep_ratio": 0.25},
                }
            )
            session = (await it.until("session.updated")).session
            assert (session.instructions, session.max_output_tokens) == ("Is it?", 7)
            assert (session.model, session.output_modalities, session.tools) == (
                "demo",
                ["text"],
                [],
            )
            assert session.temperature == 0.5
            assert session.edge_vlm["keep_ratio"] == 0.25
            await it.sdk.session.update(session={"type": "realtime", "max_output_tokens": "inf"})
            assert (await it.until("session.updated")).session.max_output_tokens == 7
            await it.sdk.session.update(session={"type": "realtime", "max_output_tokens": 10**6})
            most = (await it.until("session.updated")).session.max_output_tokens
            assert 7 < most < 10**6

    run(talk())


def test_one_answer_may_differ(server: Server) -> None:
    async def talk() -> None:
        async with talking(server) as it:
            await it.until("session.created")
            await it.show(png(picture(1)), kind="image/png")
            await it.say(QUESTION)
            await it.sdk.response.create(response={"max_output_tokens": 2, "conversation": "none"})
            cut = (await it.until("response.done")).response
            assert (cut.status, cut.status_details.reason) == ("incomplete", "max_output_tokens")
            assert (cut.usage.output_tokens, cut.conversation_id) == (2, None)
            asked = {
                "input": [
                    {
                        "type": "message",
                        "role": "user",
                        "content": [{"type": "input_text", "text": "Is there a dog?"}],
                    }
                ],
                "edge_vlm": {"choice": ["yes", "no"]},
            }
            await it.sdk.response.create(response=asked)
            chosen = (await it.until("response.done")).response
            assert chosen.output[0].content[0].text in ("yes", "no")
            assert chosen.usage.output_tokens == 1

    run(talk())


def test_an_answer_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said stays said, and the next question is answered."""

    async def talk(server: Server) -> None:
        async with talking(server, "letters") as it:
            await it.until("session.created")
            await it.sdk.session.update(session={"type": "realtime", "max_output_tokens": 120})
            await it.show(jpeg(1))
            await it.say("a ?")
            await it.sdk.response.create(
                response={"edge_vlm": {"json_schema": {"enum": ["a" * 100]}}}
            )
            await it.until("response.output_text.delta")
            await it.sdk.response.cancel()
            done = (await it.until("response.done")).response  # the answer stands until then
            held.let_go()
            assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
            said = done.output[0].content[0].text
            assert 0 < len(said) < 100
            assert said == "".join(e.delta for e in it.of("response.output_text.delta"))
            await it.say("a ?")
            await it.sdk.response.create(response={"edge_vlm": {"choice": ["b"]}})
            assert (await it.until("response.done")).response.output[0].content[0].text == "b"

    with serving(letters_bundle(tmp_path), api_key=KEY) as server:
        held = HeldAnswers(monkeypatch)
        run(talk(server))


def refusal(server: Server, message: dict[str, Any]) -> dict[str, Any]:
    async def talk() -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with websockets.connect(server.url, additional_headers=headers) as line:
            await line.recv()
            await line.send(json.dumps({"event_id": "mine", **message}))
            while True:
                event = json.loads(await line.recv())
                assert event["type"] != "session.updated"
                if event["type"] == "error":
                    events().validate_python(event)
                    assert event["error"]["event_id"] == "mine"
                    error: dict[str, Any] = event["error"]
                    return error

    found: dict[str, Any] = run(talk())
    return found


def item(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    message = {"type": "message", "role": role, "content": list(parts)}
    return {"type": "conversation.item.create", "item": message}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "session.update", "session": {"nonsense": 1}}, "E-PROTOCOL"),
        ({"type": "session.update", "session": {"edge_vlm": {"keep": 1}}}, "E-PROTOCOL"),
        (
            {
                "type": "session.update",
                "session": {"keep_ratio": 0.5, "edge_vlm": {"keep_ratio": 0.25}},
            },
            "E-CONFIG",
        ),
        ({"type": "response.create", "response": {"nonsense": 1}}, "E-PROTOCOL"),
        (
            {"type": "response.create", "text": "?", "response": {"edge_vlm": {"choice": []}}},
            "E-NO-FRAME",
        ),
        (item({"type": "input_audio", "audio": "AAAA"}), "E-PROTOCOL"),
        (item({"type": "input_text", "text": "a"}, role="system"), "E-PROTOCOL"),
        (item({"type": "input_image"}), "E-PROTOCOL"),
        (item({"type": "input_image", "image_url": data_uri(b"no picture")}), "E-MEDIA"),
        (item({"type": "input_image", "image_url": "https://example.org/a.jpg"}), "E-MEDIA"),
        (item({"type": "input_image", "image_url": "file:///etc/passwd"}), "E-MEDIA"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "E-UNKNOWN-TYPE"),
        ({"type": "input_image_buffer.append", "image": "*"}, "E-PROTOCOL"),
    ],
)
def test_what_is_refused_leaves_the_session_open(
    server: Server, message: dict[str, Any], code: str
) -> None:
    assert refusal(server, message)["code"] == code


def test_another_model_is_refused(server: Server) -> None:
    async def talk() -> None:
        async with talking(server, model="gpt-realtime") as it:
            event = await it.sdk.recv()
            assert (event.type, event.error.code) == ("error", "E-MODEL")
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await it.sdk.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008

    run(talk())


def test_a_browser_offers_the_key_as_openais_clients_do(server: Server) -> None:
    async def talk() -> None:
        offered: Any = ["realtime", f"openai-insecure-api-key.{KEY.replace(' ', '')}"]
        with serving(api_key=KEY.replace(" ", "")) as other:
            async with websockets.connect(other.url, subprotocols=offered) as line:
                assert line.subprotocol == "realtime"
                assert json.loads(await line.recv())["type"] == "session.created"

    run(talk())


def test_the_buffer_of_other_clients_is_a_camera(server: Server) -> None:
    async def talk() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with websockets.connect(server.url, additional_headers=headers) as line:
            await line.recv()
            image = data_uri(jpeg(1)).partition(",")[2]
            await line.send(json.dumps({"type": "input_image_buffer.append", "image": image}))
            event = await next_event(line)
            assert (event["type"], event["frame_sequence"]) == ("frame.accepted", 1)

    run(talk())


def test_http_asks_a_live_stream(server: Server) -> None:
    """What its viewer has shown it, without sending a picture; the viewer sees the answer, too."""
    from edge_vlm_runtime.client.connection import Access

    async def talk() -> None:
        heard: list[protocol.ServerEvent] = []
        settings: Any = {"delivery": "wait"}
        async with await Client.connect(
            server.url, settings, on_event=heard.append, access=Access(api_key=KEY)
        ) as viewer:
            for number, frame in enumerate(clip_frames()[:11]):
                await viewer.send_frame(frame, number * 500_000)
            await viewer.wait_processed()

            assert isinstance(viewer.created, protocol.SessionCreated)
            session_id = viewer.created.session_id

            def ask(**more: Any) -> Any:
                with client_of(server, KEY) as client:
                    return client.chat.completions.create(
                        model="demo",
                        messages=[{"role": "user", "content": QUESTION}],
                        extra_body={"edge_vlm": {"session": session_id}},
                        **more,
                    )

            done = await asyncio.to_thread(ask)
            assert done.choices[0].message.content == TRUTH
            cut = await asyncio.to_thread(ask, max_tokens=1)
            assert cut.choices[0].finish_reason == "length"
            assert (await viewer.ask(QUESTION)).text == TRUTH
            # What was said to others has come by then; their replies may come before it.
            answers = [e.text for e in heard if isinstance(e, protocol.ResponseDone)]
            assert answers[0] == TRUTH

    run(talk())
