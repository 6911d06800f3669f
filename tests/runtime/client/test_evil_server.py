"""A client believes no server: whatever that sends, a typed error in bounded time and memory."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from edge_vlm.config import MOST_FPS
from edge_vlm.errors import EdgeVlmError, ProtocolError, ServerUnreachable
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client import bounds, live_streams
from edge_vlm_runtime.client.client import Client, connect
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.client.json_lines import event_fields
from edge_vlm_runtime.client.live_streams import LiveStreams
from edge_vlm_runtime.client.live_table import LiveGauges
from edge_vlm_runtime.client.terminal import LineOutput
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from tests.fuzz.harness import VALUES, bounded, places
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.scripted_server import LIMITS
from tests.runtime.server.live import TIMEOUT_S, run
from tests.runtime.session.test_recording import recorded_session

Talk = Callable[[ServerConnection], Awaitable[None]]
OPENING: dict[str, Any] = json.loads(
    protocol.encode(
        protocol.SessionCreated(
            sequence=1,
            session_id="s",
            resume_token="t",
            protocol_version=1,
            server="evil",
            model=protocol.Model(bundle="b", limits=LIMITS),
            settings=SessionSettings(),
            limits=ServerLimits(),
            notes=["a note"],
        )
    )
)


def changed(path: tuple[Any, ...], value: Any, fields: dict[str, Any] = OPENING) -> dict[str, Any]:
    opening: dict[str, Any] = json.loads(json.dumps(fields))
    owner: Any = opening
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return opening


def opening_with(opening: dict[str, Any], *events: dict[str, Any]) -> Talk:
    async def talk(line: ServerConnection) -> None:
        await line.send(json.dumps(opening))
        for number, event in enumerate(events, 2):
            await line.send(json.dumps({**event, "sequence": number}))
        async for message in line:  # says nothing to anything
            if isinstance(message, str) and json.loads(message)["type"] == "session.close":
                return

    return talk


async def against(talk: Talk, use: Callable[[Client], Awaitable[object]]) -> None:
    async with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}/v1/realtime", reconnect=False) as client:
            await use(client)


async def nothing(client: Client) -> None:
    pass


async def until_it_ends(client: Client) -> None:
    async for _ in client.events():
        pass


WILD = {
    "a rate that is no rate": (("settings", "fps_cap"), 1e308),
    "a grid that no terminal shows": (("model", "limits", "cell_grid"), 5000),
    "no cells": (("model", "limits", "num_cells"), 0),
    "a number of no machine": (("model", "limits", "max_positions"), 1 << 70),
    "frames without end": (("limits", "max_unacknowledged_frames"), 0),
    "a path for a name": (("session_id",), "../../../tmp/x"),
    "an absolute path for a name": (("session_id",), "/tmp/x"),
    "a header in a name": (("session_id",), "x\r\nX-Evil: 1"),
    "a number that is none": (("limits", "resume_grace_s"), "soon"),
}


@pytest.mark.parametrize("case", WILD)
def test_an_opening_that_no_server_of_ours_sends(case: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        run(against(opening_with(changed(*WILD[case])), nothing))
    assert str(caught.value).isprintable()


def test_any_change_of_an_opening_is_read_or_refused() -> None:
    known, dice = places(OPENING), random.Random(0)
    taken = 0
    for _ in range(400):
        other = changed(dice.choice(known), dice.choice(VALUES))
        try:
            event = protocol.decode_server_event(json.dumps(other))
            assert isinstance(event, protocol.SessionCreated)
            bounds.check_opening(event)
        except (ProtocolError, UnicodeError) as error:
            assert str(error).isprintable()
            continue
        taken += 1
        assert event.model.limits.useful_side > 0
        assert event.settings.fps_cap <= MOST_FPS
    assert 0 < taken < 300


ACCEPTED: dict[str, Any] = {
    "type": "frame.accepted",
    **{"frame_sequence": 1, "time_s": 0.0, "cells_seen": 81, "cells_kept": 1, "kept_cells": [0]},
    **{"stage_ms": {}, "queue_ms": 1.0, "age_ms": 1.0, "kv_tokens": 5, "in_memory": True},
}
EVENTS: dict[str, dict[str, Any]] = {
    "cells that there are not": {**ACCEPTED, "kept_cells": [10**6]},
    "more cells than there are": {**ACCEPTED, "kept_cells": [0] * 1000},
    "a number of no machine": {**ACCEPTED, "cells_seen": 1 << 70},
    "a path for an alert": {
        "type": "alert.triggered",
        **{"alert_id": "../../x", "episode": 1, "question": "q", "probability": 0.9},
        **{"frame_sequence": 1, "time_s": 1.0, "age_s": 0.1, "evidence": None},
    },
    "a number that is left out": {"type": "pong", "sequence": 7},
    "an unknown type with a number of no machine": {"type": "zzz", "x": "BIG"},
    "nesting without end": {"type": "session.stats", "frames_dropped": VALUES[-1]},
}


@pytest.mark.parametrize("case", EVENTS)
def test_an_event_that_no_server_of_ours_sends(case: str) -> None:
    event = EVENTS[case]

    async def talk(line: ServerConnection) -> None:
        await line.send(json.dumps(OPENING))
        await line.send(json.dumps({"sequence": 2, **event}).replace('"BIG"', "1e999"))
        await line.wait_closed()

    with pytest.raises(ProtocolError):
        run(against(talk, until_it_ends))


def test_any_change_of_an_event_is_shown_or_refused(tmp_path: Path) -> None:
    """Of those of a session that was recorded."""
    kinds = {type(event): event for event in recorded_session(tmp_path / "a.evlm", 3)}
    dice = random.Random(0)
    view, gauges = LineOutput(9, io.StringIO()), LiveGauges()
    shown = 0
    for event in kinds.values():
        fields = json.loads(protocol.encode(event))
        known = places(fields)
        for _ in range(40):
            other = changed(dice.choice(known), dice.choice(VALUES), fields)
            try:
                found = protocol.decode_server_event(json.dumps(other))
                bounds.check_event(found, 9)
            except (ProtocolError, UnicodeError):
                continue
            shown += 1
            view.event(found)
            gauges.event(found)
            gauges.rows()
            event_fields(found)
    assert len(kinds) > 5
    assert shown > 50


def test_a_message_without_end_is_not_kept() -> None:
    async def talk(line: ServerConnection) -> None:
        await line.send(json.dumps({**OPENING, "server": "x" * (64 << 20)}))
        await line.wait_closed()

    with bounded(), pytest.raises(ServerUnreachable):
        run(against(talk, nothing))


def test_an_answer_without_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_vlm_runtime.client.answers.MOST_ANSWER", 1000)

    async def talk(line: ServerConnection) -> None:
        await line.send(json.dumps(OPENING))
        asked = json.loads(await line.recv())
        newest = {"frame_sequence": 1, "time_s": 0.0, "age_s": 0.0}
        created: dict[str, Any] = {"type": "response.created", "response_id": "r", "text": "?"}
        created |= {"newest_frame": newest, "event_id": asked["event_id"]}
        await line.send(json.dumps({**created, "sequence": 2}))
        delta = {"type": "response.output_text.delta", "response_id": "r", "delta": "and " * 25}
        for sequence in range(3, 40):
            await line.send(json.dumps({**delta, "sequence": sequence}))
        await line.close()

    async def ask(client: Client) -> None:
        await client.ask("?")

    with pytest.raises(ProtocolError, match="more than 1000 characters"):
        run(against(talk, ask))


def test_names_without_end_are_counted_together() -> None:
    events = [{"type": f"unknown.{number}"} for number in range(300)]

    async def use(client: Client) -> None:
        taken = client.events()
        async for _ in taken:
            if sum(client.unknown_events.values()) == len(events):
                return

    async def checked(client: Client) -> None:
        await use(client)
        assert len(client.unknown_events) == bounds.MOST_NAMES + 1
        assert client.unknown_events[bounds.OTHERS] == 300 - bounds.MOST_NAMES

    run(against(opening_with(OPENING, *events), checked))


def test_frames_that_nobody_acknowledges_are_not_kept_without_end() -> None:
    async def use(client: Client) -> None:
        picture = jpeg(1)
        for _ in range(bounds.MOST_UNACKNOWLEDGED):
            await client.send_frame(picture)
        one_more = asyncio.ensure_future(client.send_frame(picture))
        done, _ = await asyncio.wait([one_more], timeout=0.2)
        assert not done
        one_more.cancel()

    opening = changed(("limits", "max_unacknowledged_frames"), 1 << 40)
    run(against(opening_with(opening), use))


def test_a_picture_that_the_server_has_no_room_for_is_named() -> None:
    async def use(client: Client) -> None:
        await client.send_frame(np.zeros((40, 40, 3), np.uint8))

    with pytest.raises(EdgeVlmError, match="the server takes 1"):
        run(against(opening_with(changed(("limits", "max_message_bytes"), 1)), use))


def test_the_key_does_not_go_where_a_server_leads() -> None:
    async def redirected() -> list[str | None]:
        seen: list[str | None] = []

        def elsewhere(line: ServerConnection, request: Request) -> None:
            seen.append(request.headers.get("Authorization"))

        async with serve(opening_with(OPENING), "127.0.0.1", 0, process_request=elsewhere) as two:
            port = two.sockets[0].getsockname()[1]

            def lead(line: ServerConnection, request: Request) -> Response:
                target = f"ws://localhost:{port}/v1/realtime"
                return Response(302, "Found", Headers([("Location", target)]))

            async with serve(opening_with(OPENING), "127.0.0.1", 0, process_request=lead) as one:
                url = f"ws://127.0.0.1:{one.sockets[0].getsockname()[1]}/v1/realtime"
                with pytest.raises(ServerUnreachable, match="302"):
                    await Client.connect(url, access=Access(api_key="secret"))
        return seen

    assert run(redirected()) == []


# ---- over HTTP -----------------------------------------------------------------------------------


@contextmanager
def answering(give: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                give(self)
            except OSError:  # it has had enough
                self.close_connection = True

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(TIMEOUT_S)
        server.server_close()


def saying(value: Any) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def give(handler: http.server.BaseHTTPRequestHandler) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("X-Edge-Vlm-Frame", "1e9")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return give


@pytest.mark.parametrize("value", [[], 5, {}, {"data": 5}, {"data": [5]}, b"[" * 10_000, b"\xff"])
def test_an_http_answer_that_no_server_of_ours_gives(value: Any) -> None:
    with answering(saying(value)) as url:
        streams = LiveStreams(url)
        for call in (
            streams.sessions,
            lambda: streams.ask("s", "?"),
            lambda: streams.snapshot("s"),
            lambda: streams.alerts("s"),
        ):
            with pytest.raises(ProtocolError):
                call()


def test_an_http_answer_without_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_streams, "MOST_BYTES", 1 << 20)

    def give(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * (1 << 16))

    with bounded(), answering(give) as url, pytest.raises(ProtocolError, match="does not end"):
        LiveStreams(url).sessions()
