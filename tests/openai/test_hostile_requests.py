"""Requests that would hold the server, its memory or its live streams for too long."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from edge_vlm.errors import QuestionCancelled, QuestionTooLong
from edge_vlm.errors.requests import AnswerFormError, MediaRefused
from edge_vlm.pixels import video as video_module
from edge_vlm.pixels.frames import decode_picture
from edge_vlm.pixels.video import write_video
from edge_vlm_runtime.inference.constraints import MAX_FORM, choice_grammar, schema_grammar
from edge_vlm_runtime.openai import asgi, fetching
from edge_vlm_runtime.openai.chat_request import read_chat_request
from edge_vlm_runtime.openai.content import Media
from edge_vlm_runtime.openai.envelope import headers_of, status_of
from edge_vlm_runtime.openai.fetching import fetch, is_public
from edge_vlm_runtime.openai.media import MediaRules, read_picture
from edge_vlm_runtime.openai.request_queue import RequestQueue
from edge_vlm_runtime.openai.shots import _moments, shots_of
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server
from tests.openai.served import CLIP, TIMEOUT_S, data_uri, picture_part, post, serving, user
from tests.openai.test_bad_requests import HI, error_of
from tests.runtime.cameras.pictures import jpeg


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_waiting_bytes=2 << 20) as running:
        yield running


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_uri(data, "video/mp4")}}


def film(tmp_path: Path, num_frames: int, fps: float = 2) -> bytes:
    path = tmp_path / "film.mp4"
    write_video(path, np.full((num_frames, 96, 96, 3), 90, np.uint8), fps)
    return path.read_bytes()


# ---- numbers and forms -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"temperature": 10**400}, "E-REQUEST", "temperature"),
        ({"guided_json": "[" * 100_000}, "E-REQUEST", "guided_decoding.json"),
        ({"edge_vlm": {"keep_ratio": 5e-324}}, "E-CONFIG", None),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "E-REQUEST",
            "response_format.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strct": 1}}},
            "E-REQUEST",
            "response_format.json_schema.strct",
        ),
        ({"media_io_kwargs": {"vidoe": {"fps": 1}}}, "E-REQUEST", "media_io_kwargs.vidoe"),
        (
            {"messages": user(f"<{'9' * 400} seconds>", picture_part(jpeg(1)), "Hi")},
            "E-REQUEST",
            "messages[0].content[1].image_url.url",
        ),
        ({"messages": user("a" * 1_000_000)}, "E-QUESTION-TOO-LONG", None),
    ],
)
def test_what_has_no_bound_or_no_effect_is_refused(
    server: Server, change: dict[str, Any], code: str, param: str | None
) -> None:
    assert error_of(post(server, {**HI, **change}), 400, code)["param"] == param


def test_a_form_is_bounded() -> None:
    with pytest.raises(AnswerFormError, match=f"{MAX_FORM} are allowed"):
        schema_grammar({"description": "a" * MAX_FORM})
    with pytest.raises(AnswerFormError, match=f"{MAX_FORM} are allowed"):
        choice_grammar(["a" * MAX_FORM])


# ---- videos ----------------------------------------------------------------------------------


def test_a_video_of_one_frame_is_looked_at(server: Server, tmp_path: Path) -> None:
    body = {**HI, "messages": user(video_part(film(tmp_path, 1)), "Hi")}
    reply = post(server, body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_a_video_longer_than_the_models_times_is_refused_by_name(
    server: Server, tmp_path: Path
) -> None:
    body = {**HI, "messages": user(video_part(film(tmp_path, 60)), "Hi")}
    error = error_of(post(server, body), 400, "E-QUESTION-TOO-LONG")
    assert "made for 16 seconds" in error["message"]


def test_too_many_moments_are_refused_before_they_are_listed() -> None:
    asked = {**HI, "media_io_kwargs": {"video": {"fps": 240}}}
    with pytest.raises(QuestionTooLong, match="frames of the video are wanted"):
        _moments(1e12, read_chat_request(json.dumps(asked).encode()), 2.0, 10)
    assert len(_moments(1e12, read_chat_request(json.dumps(HI).encode()), 2.0, 10)) == 10


def test_nothing_is_kept_of_a_video_that_was_sent(server: Server) -> None:
    before = video_module.probe_video.cache_info().currsize
    body = {**HI, "messages": user(video_part(CLIP.read_bytes()), "What is there now?")}
    assert post(server, body).status_code == 200
    assert video_module.probe_video.cache_info().currsize == before


# ---- live streams ----------------------------------------------------------------------------


def test_a_long_question_to_a_live_stream_is_not_counted_on_its_time(server: Server) -> None:
    with connect(server.url) as viewer:
        own = {"edge_vlm": {"session": json.loads(viewer.recv())["session_id"]}}
        reply = post(server, {**HI, **own, "messages": user("a b " * 100_000)})
        assert "characters" in error_of(reply, 400, "E-QUESTION-TOO-LONG")["message"]


def test_pictures_are_decoded_before_they_reach_the_engines() -> None:
    """A picture of 64 megapixels takes seconds, which live streams would wait for."""
    body = {**HI, "messages": user(picture_part(jpeg(1)), picture_part(jpeg(2)[:-300]), "Hi")}
    request = read_chat_request(json.dumps(body).encode())
    shots = shots_of(request, MediaRules(), fps=2.0, most=9)
    assert np.array_equal(decode_picture(next(shots).data), decode_picture(jpeg(1)))
    with pytest.raises(MediaRefused, match="broken") as refused:
        next(shots)
    assert refused.value.param == "messages[0].content[1].image_url.url"
    assert next(shots_of(request, MediaRules(), fps=2.0, most=9)).data.startswith(b"P6")


# ---- clients that do nothing -----------------------------------------------------------------


def test_a_body_that_does_not_come_gives_its_memory_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "PATIENCE_S", 0.2)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(2 << 20))
    connection.endheaders(b"{")
    reply = connection.getresponse()
    assert reply.status == 408
    assert json.loads(reply.read())["error"]["code"] == "E-TIMEOUT"
    connection.close()
    monkeypatch.undo()  # one that is sent slowly, on a busy machine, is not one that does not come
    assert post(server, HI).status_code == 200  # else 503: all memory would be spoken for


def test_a_client_that_does_not_read_gives_its_turn_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "PATIENCE_S", 0.2)
    body = json.dumps({**HI, "stream": True}).encode()
    came = iter([{"type": "http.request", "body": body}])
    scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}

    async def receive() -> dict[str, Any]:
        return next(came, None) or await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        await asyncio.get_running_loop().create_future()

    loop = server._loop
    assert loop is not None
    asked = asyncio.run_coroutine_threadsafe(server._api(scope, receive, send), loop)
    asked.result(TIMEOUT_S)
    monkeypatch.undo()
    assert post(server, HI).status_code == 200


def test_a_turn_does_not_go_to_one_who_has_just_left() -> None:
    async def ask(queue: RequestQueue, goes_on: asyncio.Event | None = None) -> None:
        async with queue.turn():
            if goes_on is not None:
                await goes_on.wait()

    async def crowd() -> None:
        queue, ends = RequestQueue(ServerLimits()), asyncio.Event()
        first = asyncio.create_task(ask(queue, ends))
        await asyncio.sleep(0)
        leaves, stays = asyncio.create_task(ask(queue)), asyncio.create_task(ask(queue))
        await asyncio.sleep(0)
        assert queue.num_waiting == 2
        ends.set()  # the first one's task runs next, and hands its turn on
        leaves.cancel()
        await asyncio.wait_for(asyncio.gather(first, stays), TIMEOUT_S)
        await asyncio.wait_for(queue.idle.wait(), TIMEOUT_S)
        assert leaves.cancelled()
        assert queue.num_waiting == 0

    asyncio.run(crowd())


# ---- files and addresses ---------------------------------------------------------------------


def test_a_folder_that_becomes_a_link_opens_no_other_one(tmp_path: Path) -> None:
    allowed, private = tmp_path / "allowed", tmp_path / "private"
    allowed.mkdir()
    private.mkdir()
    (private / "a.jpg").write_bytes(jpeg(1))
    rules = MediaRules(folders=(allowed,))
    allowed.rmdir()
    allowed.symlink_to(private)
    media = Media(kind="picture", url=(allowed / "a.jpg").as_uri(), param="here")
    with pytest.raises(MediaRefused, match="no such file"):
        read_picture(media, rules)


@pytest.mark.parametrize("address", ["2002:7f00:1::", "2002:a00:1::1", "fec0::1"])
def test_addresses_within_addresses_are_known(address: str) -> None:
    assert not is_public(address)


def drip(line: socket.socket) -> None:
    """A header that never ends."""
    try:
        line.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            line.sendall(b"X: y\r\n")
            threading.Event().wait(0.02)
    except OSError:
        pass


def break_off(line: socket.socket) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")


@pytest.mark.parametrize(
    ("behave", "longest_s", "words"),
    [(drip, 0.3, "takes more than"), (break_off, TIMEOUT_S, "breaks off")],
)
def test_a_fetch_ends_whatever_the_other_side_does(
    behave: Callable[[socket.socket], None],
    longest_s: float,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "LONGEST_S", longest_s)
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    monkeypatch.setattr(http.client, "_MAXHEADERS", 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            line, _ = listener.accept()
            with line:
                line.recv(4096)
                behave(line)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MediaRefused, match=words):
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", param="x", max_bytes=1 << 20)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_a_path_with_a_line_break_is_answered_in_the_envelope(server: Server) -> None:
    line = socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)
    with line:
        line.sendall(b"GET /v1/a%0Ab HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        reply = b"".join(iter(lambda: line.recv(65536), b""))
    assert b"E-NOT-FOUND" in reply


def test_a_question_that_was_cancelled_may_be_asked_again() -> None:
    assert status_of(QuestionCancelled("before its answer began")) == 503
    assert headers_of(QuestionCancelled("before its answer began")) == {"Retry-After": "1"}
