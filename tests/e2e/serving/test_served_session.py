"""Frames in, answers out over a real websocket, with the real tiny model."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    NoQuestion,
    ServerBusy,
    ServerUnreachable,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.server.asgi_server import listen
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.ingest import FrameIngest
from tests.openai.served import HeldAnswers, next_event
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.seen import Seen
from tests.runtime.server.live import TIMEOUT_S, open_server, run
from tests.tiny import ROOT, tiny_bundle

FILE: Settings = {"delivery": "wait", "max_answer_tokens": 6}
QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = ServerLimits(max_message_bytes=100_000)
    # A live picture that the engines come to late is dropped: not here, however busy they are.
    settings = {"max_frame_age_s": TIMEOUT_S}
    with Server.open(tiny_bundle(), threads=1, limits=limits, settings=settings) as running:
        running.start()
        yield running


async def send(client: Client, first: int, count: int) -> None:
    for number in range(first, first + count):
        await client.send_frame(jpeg(number), number * 500_000)
    await client.wait_processed()


def test_a_file_is_processed_whole_and_questions_are_answered(server: Server) -> None:
    async def session() -> None:
        seen = Seen()
        async with await Client.connect(server.url, FILE, on_event=seen) as client:
            await send(client, 0, 10)
            assert sorted(seen.accepted) == list(range(1, 11))
            assert not seen.dropped
            assert seen.accepted[1].cells_kept == seen.accepted[1].cells_seen == 9
            kept = sum(event.cells_kept for event in seen.accepted.values())
            assert kept <= 0.5 * 90
            assert (client.frames.processed, client.frames.cells_kept) == (10, kept)
            stages = {name for event in seen.accepted.values() for name in event.stage_ms}
            assert stages >= {"decode", "preprocess", "vit_stem", "vit_trunk", "prefill"}
            answer = await client.ask(QUESTION)
            assert answer.status == "completed"
            assert answer.newest_frame.frame_sequence == 10
            assert answer.newest_frame.time_s == 4.5
            assert answer.ttft_s is not None
            assert answer.ttft_s > 0
            again = await client.ask(QUESTION)
            assert again.text == answer.text

    run(session())


def test_events_are_numbered_without_gaps_and_deltas_make_the_answer(server: Server) -> None:
    events: list[protocol.ServerEvent] = []

    async def session() -> str:
        async with await Client.connect(server.url, FILE, on_event=events.append) as client:
            await send(client, 0, 3)
            stream = await client.start_answer(QUESTION)
            await send(client, 3, 3)
            text = "".join([delta async for delta in stream])
            assert text == (await stream.answer()).text
            return text

    assert run(session())
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert isinstance(events[0], protocol.SessionCreated)
    assert isinstance(events[-1], protocol.SessionClosed)


def test_two_viewers_at_once_see_what_each_sees_alone(server: Server) -> None:
    async def viewer(offset: int) -> tuple[list[list[int]], str]:
        seen = Seen()
        async with await Client.connect(server.url, FILE, on_event=seen) as client:
            for number in range(6):
                await client.send_frame(jpeg(number + offset), number * 500_000)
            await client.wait_processed()
            text = (await client.ask(QUESTION)).text
            return [event.kept_cells for _, event in sorted(seen.accepted.items())], text

    async def alone() -> list[Any]:
        return [await viewer(0), await viewer(20)]

    async def together() -> list[Any]:
        return list(await asyncio.gather(viewer(0), viewer(20)))

    expected = run(alone())
    assert run(together()) == expected
    assert expected[0] != expected[1]


def test_budget_and_mode_change_in_mid_stream(server: Server) -> None:
    """Over the wire, without a break: each change holds from the next frame or question on."""

    async def session() -> None:
        seen = Seen()
        async with await Client.connect(server.url, FILE, on_event=seen) as client:
            changes: list[Settings] = [
                {"keep_ratio": 0.8},
                {"keep_ratio": 0.3, "attention": "exact"},
                {"vision_tokens_per_s": 9.0, "attention": "last_n", "last_n": 2},
                {"vision_tokens_per_s": 0.0, "keep_ratio": 0.8, "attention": "frame"},
            ]
            shares, modes, texts = [], [], []
            for part, change in enumerate(changes):
                updated = await client.update(change)
                modes.append(updated.settings.attention.value)
                await send(client, part * 40, 40)
                frames = range(part * 40 + 1, part * 40 + 41)
                events = [seen.accepted[number] for number in frames]
                shares.append(sum(event.cells_kept for event in events) / (40 * 9))
                answer = await client.ask(QUESTION)
                assert answer.status == "completed"
                assert answer.newest_frame.frame_sequence == frames[-1]
                texts.append(answer.usage.vision_tokens)
            assert shares == pytest.approx([0.8, 0.3, 0.5, 0.8], rel=0.12)
            assert modes == ["frame", "exact", "last_n", "frame"]
            assert texts[2] < min(texts[0], texts[1], texts[3])  # two frames only
            assert not seen.dropped
            assert not seen.errors

    run(session())


def test_live_frames_all_get_one_outcome_even_in_a_flood(server: Server) -> None:
    async def session() -> None:
        settings: Settings = {"delivery": "live", "fps_cap": 10.0, "drop_duplicates": False}
        async with await Client.connect(server.url, settings) as client:
            unbounded = dataclasses.replace(client.created.limits, max_unacknowledged_frames=1000)
            client.created.limits = unbounded
            for number in range(60):
                await client.send_frame(jpeg(number % 40), number * 50_000)
            await client.wait_processed()
            assert client.frames.processed + client.frames.dropped.total() == 60
            assert set(client.frames.dropped) <= {"busy", "rate", "stale"}
            assert client.frames.dropped["rate"] >= 20
            assert client.frames.processed >= 1

    run(session())


def test_frames_may_come_as_json(server: Server) -> None:
    async def session() -> None:
        async with connect(server.url) as raw:
            await raw.recv()
            picture = base64.b64encode(jpeg(1)).decode()
            await raw.send(
                json.dumps(
                    {
                        "type": "input_video_frame.append",
                        "sequence": 5,
                        "capture_time_us": 0,
                        "frame": picture,
                    }
                )
            )
            event = await next_event(raw)
            assert (event["type"], event["frame_sequence"]) == ("frame.accepted", 5)

    run(session())


def test_cancel_ping_stats_and_close(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldAnswers(monkeypatch)

    async def session() -> None:
        events: list[protocol.ServerEvent] = []
        settings: Settings = {"delivery": "wait", "max_answer_tokens": 100}
        async with await Client.connect(server.url, settings, on_event=events.append) as client:
            await send(client, 0, 1)
            answers = [await client.start_answer(QUESTION) for _ in range(3)]
            await client.cancel()
            statuses = []
            for answer in answers:
                try:
                    statuses.append((await answer.answer()).status)
                except EdgeVlmError as error:
                    statuses.append(error.code)
            assert statuses[0] in ("cancelled", "E-CANCELLED")  # it had begun or not
            assert statuses[1:] == ["E-CANCELLED", "E-CANCELLED"]
            held.let_go()
            before = len(events)
            await client._send_json("ping", "p1")
            news: set[type[protocol.ServerEvent]] = set()
            while not news >= {protocol.Pong, protocol.SessionStats}:
                await asyncio.sleep(0.05)
                news = {type(event) for event in events[before:]}
            pongs = [event.event_id for event in events if isinstance(event, protocol.Pong)]
            assert pongs == ["p1"]
            found = [event for event in events if isinstance(event, protocol.SessionStats)]
            assert found[-1].frames_processed == 1

    run(session())


def test_settings_are_announced_changed_and_refused(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, FILE) as client:
            updated = await client.update({"keep_ratio": 0.25, "policy": "frame_topk"})
            assert updated.settings.keep_ratio == 0.25
            with pytest.raises(ConfigError, match="keep_ratio"):
                await client.update({"keep_ratio": 7})
            await send(client, 0, 16)  # by then the first frame is paid back
            assert client.frames.cells_kept <= 0.25 * 16 * 9

    run(session())


def test_a_client_that_vanishes_in_the_middle_of_an_answer_leaves_room(server: Server) -> None:
    async def vanish() -> None:
        settings: Settings = {"delivery": "wait", "max_answer_tokens": 100}
        client = await Client.connect(server.url, settings, reconnect=False)
        await send(client, 0, 2)
        await client.start_answer(QUESTION)
        client._line._connection.transport.abort()
        if client._reader is not None:
            await client._reader

    async def session() -> None:
        for _ in range(6):  # more than the server has sessions
            await vanish()
            await asyncio.sleep(0.05)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                async with await Client.connect(server.url, FILE) as client:
                    await send(client, 0, 1)
                    assert (await client.ask(QUESTION)).status == "completed"
                    return
            except ServerBusy:
                assert time.monotonic() < deadline

    run(session())


def test_a_question_may_be_said_first_and_asked_then(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, FILE) as client:
            await send(client, 0, 1)
            await client.wait_processed()
            at_once = await client.ask(QUESTION)
            await client.say(QUESTION)
            assert (await client.ask("")).text == at_once.text
            with pytest.raises(NoQuestion):
                await client.ask("")

    run(session())


def test_a_full_server_says_so_and_keeps_its_viewers(server: Server) -> None:
    async def session() -> None:
        clients = [await Client.connect(server.url, FILE) for _ in range(4)]
        try:
            with pytest.raises(ServerBusy, match="4 of 4 sessions are taken, there is no waiting"):
                await Client.connect(server.url)
            async with connect(server.url) as raw:
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    while True:
                        await raw.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1013
            await send(clients[0], 0, 1)
            assert (await clients[0].ask(QUESTION)).status == "completed"
        finally:
            for client in clients:
                await client.close()

    run(session())


def test_pages_from_elsewhere_may_not_connect(server: Server) -> None:
    async def session(origin: str) -> None:
        async with connect(server.url, additional_headers={"Origin": origin}) as raw:
            await raw.recv()

    run(session(server.page_url.rstrip("/")))
    with pytest.raises(websockets.InvalidStatus, match="403"):
        run(session("http://elsewhere.example"))


def get(server: Server, path: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(server.page_url.rstrip("/") + path) as reply:
            return reply.status, reply.headers["content-type"], reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, "", ""


def test_http_on_the_same_port(server: Server) -> None:
    assert get(server, "/healthz")[0] == get(server, "/health")[0] == 200
    assert get(server, "/readyz")[0] == 200
    status, kind, text = get(server, "/version")
    assert (status, kind) == (200, "application/json")
    assert json.loads(text)["protocol_version"] == 1
    assert "vit_trunk, llm by ONNX Runtime" in json.loads(text)["engines"]
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "text/javascript"),
        ("/style.css", "text/css"),
    ):
        status, found, text = get(server, path)
        assert status == 200
        assert found.startswith(kind)
        assert len(text) > 500
        assert "http://" not in text
        assert "https://" not in text
    assert get(server, "/nothing")[0] == 404


def test_a_bug_ends_one_session_with_1011_and_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_receive = FrameIngest.receive

    def receive(self: FrameIngest, frame: EncodedFrame, now_ns: int, **options: Any) -> None:
        if frame.data == jpeg(39):
            raise RuntimeError("a bug of ours")
        real_receive(self, frame, now_ns, **options)

    monkeypatch.setattr(FrameIngest, "receive", receive)

    async def session() -> None:
        async with await Client.connect(server.url, FILE) as other:
            seen = Seen()
            async with await Client.connect(server.url, FILE, on_event=seen) as client:
                with pytest.raises(EdgeVlmError, match=r"1011|failed"):
                    await client.send_frame(jpeg(39), 0)
                    await client.wait_processed()
                assert seen.errors[0].code == "E-INTERNAL"
                assert "a bug of ours" not in seen.errors[0].message
            await send(other, 0, 2)
            assert (await other.ask(QUESTION)).status == "completed"

    run(session())
    assert "a bug of ours" in caplog.text


def test_stopping_lets_an_answer_end_and_says_goodbye() -> None:
    async def session(server: Server) -> None:
        events: list[protocol.ServerEvent] = []
        settings: Settings = {"delivery": "wait", "max_answer_tokens": 40}
        client = await Client.connect(server.url, settings, on_event=events.append)
        await send(client, 0, 2)
        answer = await client.start_answer(QUESTION)
        while not any(isinstance(event, protocol.ResponseCreated) for event in events):
            await asyncio.sleep(0.005)
        stopper = threading.Thread(target=server.stop, args=(30.0,))
        stopper.start()
        assert (await answer.answer()).status == "completed"
        with pytest.raises(ServerUnreachable, match="1001"):
            while True:
                await client.send_frame(jpeg(3), 9_000_000)
                await asyncio.sleep(0.05)
        await client.close()
        await asyncio.to_thread(stopper.join)
        kinds = [type(event) for event in events]
        assert protocol.SessionGoAway in kinds
        assert kinds[-1] is protocol.SessionClosed

    with open_server() as server:
        server.start()
        run(session(server))


def test_events_do_not_wait_for_acknowledgements(server: Server) -> None:
    """Without TCP_NODELAY each answer takes 40 ms longer; asyncio sets it only for such sockets."""
    assert server._socket.proto == socket.IPPROTO_TCP


def test_nobody_listening_is_a_typed_error(server: Server) -> None:
    async def session() -> None:
        await Client.connect("ws://127.0.0.1:9/v1/realtime")

    with pytest.raises(ServerUnreachable, match="no edge-vlm server"):
        run(session())


def test_a_taken_port_is_a_typed_error(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen.*another --port"):
        Server.open(tiny_bundle(), threads=1, port=server.port)


def test_an_address_of_another_machine_is_a_typed_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen.*another --host"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_serve_command_drains_on_a_signal(how: signal.Signals) -> None:
    code = (
        "import sys; from edge_vlm_runtime.cli.serve import serve; import argparse; "
        "p = argparse.ArgumentParser(); serve.add_arguments(p); "
        f"sys.exit(serve.run(p.parse_args(['--bundle', {str(tiny_bundle())!r}, '--port', '0', "
        "'--threads', '1'])))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split("clients: ")[1].strip(" )\n")

        async def session() -> None:
            client = await Client.connect(url, FILE)
            await send(client, 0, 1)
            process.send_signal(how)
            with pytest.raises(ServerUnreachable, match="1001"):
                while True:
                    await client.send_frame(jpeg(2), 5_000_000)
                    await asyncio.sleep(0.05)
            await client.close()

        run(session())
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, err
        assert "stopped" in out
        assert "Traceback" not in err
    finally:
        process.kill()
        process.wait()
