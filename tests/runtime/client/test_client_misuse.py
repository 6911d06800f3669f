"""What scripts hand to the client by mistake: an error at once, and the session goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError, MessageTooLarge, ProtocolError
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime import Client, SyncClient, connect
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.client.live_streams import LiveStreams
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.server.live import open_server, run

PICTURE = np.arange(36 * 48 * 3, dtype=np.uint8).reshape(36, 48, 3)
NOISE = np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(max_message_bytes=300_000) as running:
        running.start()
        yield running


@pytest.fixture(params=[False, True], ids=["jpeg", "raw"])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[SyncClient]:
    with SyncClient(server.url, {"delivery": "wait", "raw_frames": request.param}) as client:
        yield client


@pytest.mark.parametrize(
    ("picture", "pts_us", "error", "words"),
    [
        (PICTURE[:, :, 0], 1, ValueError, "u8"),
        (PICTURE.astype(np.float32), 1, ValueError, "float32"),
        (np.zeros((1, 70_000, 3), np.uint8), 1, ValueError, "sides of up to 65"),
        (NOISE, 1, MessageTooLarge, "--max-message-bytes"),
        (PICTURE, 1.5, ValueError, "whole number"),
        (PICTURE, -1, ValueError, "0.."),
        (PICTURE, 1 << 64, ValueError, "0.."),
        (PICTURE, "now", ValueError, "whole number"),
    ],
    ids=range(8),
)
def test_a_frame_that_cannot_be_sent_is_not_waited_for(
    client: SyncClient, picture: Any, pts_us: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        client.send_frame(picture, pts_us)
    client.send_frame(PICTURE, np.int64(5_000_000))  # type: ignore[arg-type]
    client.wait_processed()
    assert client.frames.processed == 1


def test_memory_that_is_not_in_order_is_the_same_picture(
    client: SyncClient, server: Server
) -> None:
    turned = np.asfortranarray(PICTURE)[::-1, ::-1]
    client.send_frame(turned, 0)
    client.wait_processed()
    seen = LiveStreams(server.url).snapshot(client.created.session_id)
    assert seen.jpeg == encode_jpeg(np.ascontiguousarray(turned))


def test_a_dropped_frame_is_said_once(client: SyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edge_vlm_runtime.client"):
        for number in range(3):
            client.send_frame(b"\x89PNG", number)
        client.send_frame(jpeg(1), 1_700_000_000_000_000)  # the time of day,
        for number in range(3):
            client.send_frame(jpeg(2), number)  # and then a film's
        client.wait_processed()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "not a JPEG" in said[0] + said[1]
    assert "one kind of times" in said[0] + said[1]
    assert client.frames.dropped == {"decode_error": 3, "stale": 3}


def test_numbers_of_numpy_are_numbers(client: SyncClient) -> None:
    client.update({"keep_ratio": np.float32(0.5), "min_cells": np.int64(2)})  # type: ignore[typeddict-item]
    assert (client.settings.keep_ratio, client.settings.min_cells) == (0.5, 2)
    with pytest.raises(ConfigError, match="object"):
        client.update({"policy": object()})  # type: ignore[typeddict-item]


@pytest.mark.parametrize("key", ["ключ", "one\ntwo", 5])
def test_a_key_that_is_none_is_not_repeated(key: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        Access(api_key=key)
    assert str(key) not in str(refused.value)


def test_a_text_that_is_too_large_does_not_end_the_session(client: SyncClient) -> None:
    client.send_frame(PICTURE, 0)
    for call in (client.ask, client.say):
        with pytest.raises(MessageTooLarge, match="the server takes 300000"):
            call("x" * 300_000)
    assert client.ask("is there a red ball ?").status == "completed"


def test_events_of_no_kind(client: SyncClient) -> None:
    wrong: Any
    for wrong in (int, "alert.triggered"):
        with pytest.raises(ConfigError, match="not a kind of event"):
            client.events(wrong)
    assert client.list_alerts() == []


def test_a_callback_that_nobody_would_wait_for(server: Server) -> None:
    async def on_event(event: object) -> None: ...

    wrong: Any
    for wrong in (on_event, "print"):
        with pytest.raises(ConfigError, match="plain function"):
            run(Client.connect(server.url, on_event=wrong))


def test_another_loop_is_refused(server: Server) -> None:
    async def scenario() -> None:
        async with connect(server.url) as client:
            with pytest.raises(RuntimeError, match="SyncClient"):
                await asyncio.to_thread(asyncio.run, client.ask("is there a red ball ?"))
            assert await client.list_alerts() == []

    run(scenario())


def test_a_key_does_not_follow_a_redirection() -> None:
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        streams = LiveStreams(f"127.0.0.1:{elsewhere.server_port}", Access(api_key="secret"))
        with pytest.raises(ProtocolError, match="302"):
            streams.sessions()
        elsewhere.shutdown()
    assert seen == ["/v1/edge_vlm/sessions"]
