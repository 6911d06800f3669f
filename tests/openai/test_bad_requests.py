"""Wrong requests over HTTP: status, envelope, and nothing is read that should not be."""

from __future__ import annotations

import asyncio
import http.server
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_vlm.errors.requests import MediaRefused
from edge_vlm_runtime.openai.content import Media
from edge_vlm_runtime.openai.fetching import fetch, is_public
from edge_vlm_runtime.openai.media import MediaRules, read_picture
from edge_vlm_runtime.server.app import Server
from tests.openai.letters import letters_bundle
from tests.openai.served import (
    CLIP,
    TIMEOUT_S,
    HeldAnswers,
    data_uri,
    picture_part,
    post,
    serving,
    user,
)
from tests.runtime.cameras.pictures import jpeg

HI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
KEY = "correct horse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server may read, with ways out of it."""
    place = tmp_path_factory.mktemp("media")
    allowed = place / "allowed"
    allowed.mkdir()
    (allowed / "clip.mp4").write_bytes(CLIP.read_bytes())
    (allowed / "picture.jpg").write_bytes(jpeg(1))
    (place / "outside.jpg").write_bytes(jpeg(2))
    (allowed / "way_out.jpg").symlink_to(place / "outside.jpg")
    (allowed / "inside.jpg").symlink_to(allowed / "picture.jpg")
    (allowed / "a folder").mkdir()
    return place


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    rules = MediaRules(folders=(folder / "allowed",))
    with serving(media=rules, max_request_bytes=1 << 20, max_waiting_bytes=2 << 20) as running:
        yield running


def error_of(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    return error


def huge_png(side: int = 100_000) -> bytes:
    """A few hundred bytes that announce a picture of 30 GB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


CHAT = "messages[0].content[1]"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"no json", 400, "E-REQUEST", None),
        (b"[" * 100_000, 400, "E-REQUEST", None),
        (b"\xff\xfe", 400, "E-REQUEST", None),
        ([], 400, "E-REQUEST", None),
        ({**HI, "model": "gpt-4o"}, 404, "E-MODEL", "model"),
        ({"messages": HI["messages"]}, 400, "E-REQUEST", "model"),
        ({"model": "demo"}, 400, "E-REQUEST", "messages"),
        ({**HI, "messages": "Hi"}, 400, "E-REQUEST", "messages"),
        (
            {**HI, "messages": [{"role": "king", "content": ""}]},
            400,
            "E-REQUEST",
            "messages[0].role",
        ),
        ({**HI, "messages": user("")}, 400, "E-REQUEST", "messages[0].content"),
        ({**HI, "messages": [{"role": "assistant", "content": "a"}]}, 400, "E-REQUEST", "messages"),
        ({**HI, "nonsense": 1}, 400, "E-REQUEST", "nonsense"),
        ({**HI, "edge_vlm": {"keep": 1}}, 400, "E-REQUEST", "edge_vlm.keep"),
        ({**HI, "edge_vlm": {"keep_ratio": 0}}, 400, "E-REQUEST", "edge_vlm.keep_ratio"),
        ({**HI, "edge_vlm": {"policy": "best"}}, 400, "E-REQUEST", "edge_vlm.policy"),
        ({**HI, "edge_vlm": {"session": "none"}}, 404, "E-SESSION-GONE", None),
        ({**HI, "temperature": "hot"}, 400, "E-REQUEST", "temperature"),
        (b'{"model": "demo", "temperature": 1e999}', 400, "E-REQUEST", None),
        (b'{"model": "demo", "messages": "\\ud800"}', 400, "E-REQUEST", None),
        (
            {**HI, "media_io_kwargs": {"video": {"a\r\nSet-Cookie: b": 1}}},
            *(400, "E-REQUEST", "media_io_kwargs.video.a\r\nSet-Cookie: b"),
        ),
        ({**HI, "max_tokens": 0}, 400, "E-REQUEST", "max_tokens"),
        ({**HI, "max_tokens": True}, 400, "E-REQUEST", "max_tokens"),
        ({**HI, "top_p": 0}, 400, "E-REQUEST", "top_p"),
        ({**HI, "stop": ["a", ""]}, 400, "E-REQUEST", "stop"),
        ({**HI, "n": 2}, 400, "E-UNSUPPORTED", "n"),
        ({**HI, "logprobs": True}, 400, "E-UNSUPPORTED", "logprobs"),
        ({**HI, "tool_choice": "required"}, 400, "E-UNSUPPORTED", "tool_choice"),
        ({**HI, "response_format": {"type": "xml"}}, 400, "E-UNSUPPORTED", "response_format.type"),
        ({**HI, "guided_decoding": {"choice": []}}, 400, "E-REQUEST", "guided_decoding.choice"),
        (
            {**HI, "messages": [{"role": "tool", "content": "7", "tool_call_id": "a"}]},
            *(400, "E-UNSUPPORTED", "messages[0]"),
        ),
        (
            {**HI, "messages": user("?", {"type": "input_audio", "input_audio": {}})},
            *(400, "E-UNSUPPORTED", f"{CHAT}.type"),
        ),
        ({**HI, "messages": user("a " * 2000)}, 400, "E-QUESTION-TOO-LONG", None),
    ],
)
def test_what_is_wrong_is_named(
    server: Server, body: Any, status: int, code: str, param: str | None
) -> None:
    assert error_of(post(server, body), status, code)["param"] == param


@pytest.mark.parametrize(
    "url",
    [
        data_uri(b"no picture"),
        data_uri(b""),
        data_uri(huge_png(), "image/png"),
        data_uri(jpeg(1)[:200]),
        data_uri(CLIP.read_bytes()[:2000], "image/jpeg"),
        "data:image/jpeg;base64,*****",
        "data:image/jpeg;base64",
        "hello",
        "ftp://example.org/a.jpg",
        "https://example.org/a.jpg",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]:1/",
        "file:///etc/passwd",
        "file://elsewhere/etc/passwd",
        "file://[",
        "/etc/passwd",
    ],
)
def test_a_picture_that_is_none_is_refused(server: Server, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    reply = post(server, {**HI, "messages": user("?", part)})
    assert error_of(reply, 400, "E-MEDIA")["param"] == f"{CHAT}.image_url.url"


@pytest.mark.parametrize("name", ["outside.jpg", "allowed/way_out.jpg", "allowed/../outside.jpg",
                                  "allowed/%2e%2e/outside.jpg", "allowed/a folder", "allowed/none",
                                  "allowed/a%00b"])  # fmt: skip
def test_files_outside_the_allowed_folder_are_not_read(
    server: Server, folder: Path, name: str
) -> None:
    """And the answer is the same whether or not there is such a file."""
    part = {"type": "image_url", "image_url": {"url": f"file://{folder}/{name}"}}
    error = error_of(post(server, {**HI, "messages": user("?", part)}), 400, "E-MEDIA")
    assert error["message"].startswith("no such file in a folder that this server may read")


def test_files_in_the_allowed_folder_are_read(server: Server, folder: Path) -> None:
    for name, kind in (
        *(("picture.jpg", "image_url"), ("inside.jpg", "image_url")),
        ("clip.mp4", "video_url"),
    ):
        part = {"type": kind, kind: {"url": f"file://{folder}/allowed/{name}"}}
        reply = post(server, {**HI, "messages": user("what is there now?", part)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 10


def test_a_list_of_other_files_is_no_video(server: Server, folder: Path) -> None:
    """FFmpeg would read what it names."""
    clip = folder / "allowed" / "clip.mp4"
    for text in (
        f"ffconcat version 1.0\nfile {clip}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8,\n{clip}\n#EXT-X-ENDLIST\n",
    ):
        part = {"type": "video_url", "video_url": {"url": data_uri(text.encode(), "video/mp4")}}
        reply = post(server, {**HI, "messages": user("?", part)})
        assert error_of(reply, 400, "E-MEDIA")["param"] == f"{CHAT}.video_url.url"


def test_too_much_is_refused_before_it_is_read(server: Server) -> None:
    large = post(server, b" " * (1 << 20) + b" ")
    assert error_of(large, 413, "E-MESSAGE-TOO-LARGE")
    small = post(server, HI)
    assert small.status_code == 200


def test_pictures_that_do_not_fit_are_refused_rather_than_forgotten(server: Server) -> None:
    many = [picture_part(jpeg(number % 40)) for number in range(60)]
    own = {"policy": "keep_all", "frame_times": [number / 10 for number in range(60)]}
    error = error_of(
        post(server, {**HI, "messages": user("?", *many), "edge_vlm": own}),
        *(400, "E-QUESTION-TOO-LONG"),
    )
    assert "pictures fit" in error["message"]
    assert error["type"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "E-NOT-FOUND"),
        ("GET", "/v1", 404, "E-NOT-FOUND"),
        ("GET", "/v1/", 404, "E-NOT-FOUND"),
        ("POST", "/v1/responses", 404, "E-NOT-FOUND"),
        ("POST", "/v1/embeddings", 404, "E-NOT-FOUND"),
        ("GET", "/v1/realtime", 404, "E-NOT-FOUND"),
        ("GET", "/v1/models/other", 404, "E-MODEL"),
        ("GET", "/v1/chat/completions", 405, "E-METHOD"),
        ("DELETE", "/v1/models/demo", 405, "E-METHOD"),
        ("POST", "/v1/models", 405, "E-METHOD"),
    ],
)
def test_every_path_below_v1_answers_in_the_envelope(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    reply = httpx.request(method, server.page_url.rstrip("/") + path, timeout=TIMEOUT_S)
    error_of(reply, status, code)


def test_key_origin_and_host_are_checked() -> None:
    with serving(api_key=KEY, origins=("https://app.example",)) as server:
        error_of(post(server, HI), 401, "E-UNAUTHORIZED")
        error_of(post(server, HI, Authorization="Bearer wrong"), 401, "E-UNAUTHORIZED")
        with_key = {"Authorization": f"Bearer {KEY}"}
        assert post(server, HI, **with_key).status_code == 200
        error_of(post(server, HI, Origin="https://evil.example", **with_key), 403, "E-HOST")
        assert post(server, HI, Origin="https://app.example", **with_key).status_code == 200
        error_of(post(server, HI, Host="evil.example", **with_key), 403, "E-HOST")
        bare = httpx.get(f"{server.page_url}v1/models", timeout=TIMEOUT_S)
        assert error_of(bare, 401, "E-UNAUTHORIZED")["type"] == "authentication_error"


# ---- fetching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "x"),
    ],
)
def test_private_addresses_are_known(address: str) -> None:
    assert not is_public(address)


class _Pictures(http.server.BaseHTTPRequestHandler):
    seen: list[str] = []  # noqa: RUF012
    answers = threading.Event()

    def do_GET(self) -> None:
        self.seen.append(self.path)
        assert self.answers.wait(TIMEOUT_S)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(jpeg(1))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def neighbour() -> Iterator[str]:
    """A server in the own network that must not be asked."""
    _Pictures.seen.clear()
    _Pictures.answers.set()
    with http.server.HTTPServer(("127.0.0.1", 0), _Pictures) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/picture.jpg"
        served.shutdown()
        thread.join()


def test_nothing_is_fetched_unless_it_is_allowed_and_public(neighbour: str) -> None:
    media = Media(kind="picture", url=neighbour, param="url")
    with pytest.raises(MediaRefused, match="--allow-fetch"):
        read_picture(media, MediaRules())
    with pytest.raises(MediaRefused, match="public internet"):
        read_picture(media, MediaRules(may_fetch=True))
    named = neighbour.replace("127.0.0.1", "pictures.example")
    with pytest.raises(MediaRefused, match="public internet"):  # one of two is enough
        fetch(named, param="url", max_bytes=9, lookup=lambda *_: ["8.8.8.8", "127.0.0.1"])
    assert not _Pictures.seen


def test_what_is_allowed_is_fetched_up_to_its_limit(
    neighbour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The neighbour stands for the internet: only the check of its address is lifted."""
    monkeypatch.setattr("edge_vlm_runtime.openai.fetching.is_public", lambda address: True)
    assert fetch(neighbour, param="url", max_bytes=1 << 20) == jpeg(1)
    with pytest.raises(MediaRefused, match="more than 100 bytes"):
        fetch(neighbour, param="url", max_bytes=100)
    monkeypatch.setattr("edge_vlm_runtime.openai.fetching.LONGEST_S", 0.0)
    _Pictures.answers.clear()  # not before the end of patience, however late that is noticed
    try:
        with pytest.raises(MediaRefused, match="takes more than"):
            fetch(neighbour, param="url", max_bytes=1 << 20)
    finally:
        _Pictures.answers.set()


# ---- busy, and clients that leave ------------------------------------------------------------


def test_a_full_queue_answers_429_and_nobody_is_left_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask_all(server: Server) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            frames = [picture_part(jpeg(number)) for number in range(8)]
            body = {**HI, "messages": user("what is there now?", *frames)}
            url = f"{server.page_url}v1/chat/completions"
            asked = [asyncio.create_task(client.post(url, json=body)) for _ in range(12)]
            refused = [await reply for reply in islice(asyncio.as_completed(asked), 9)]
            held.let_go()  # the one that has its turn, and then the two that wait
            assert {reply.status_code for reply in refused} == {429}
            return await asyncio.gather(*asked)

    with serving(max_waiting_requests=2) as server:
        held = HeldAnswers(monkeypatch)
        replies = asyncio.run(ask_all(server))
        statuses = sorted(reply.status_code for reply in replies)
        assert statuses == [200] * 3 + [429] * 9
        for reply in replies:
            if reply.status_code == 429:
                assert error_of(reply, 429, "E-TOO-MANY-REQUESTS")["type"] == "rate_limit_error"
                assert int(reply.headers["retry-after"]) >= 1
        assert post(server, HI).status_code == 200


def test_memory_for_waiting_requests_is_bounded() -> None:
    large = {**HI, "messages": user("?", picture_part(jpeg(1)))}
    with serving(max_waiting_bytes=20_000, max_request_bytes=1 << 20) as server:
        with server._api._queue.held() as others:
            others.grow(19_000)
            reply = post(server, large)
            error_of(reply, 503, "E-SERVER-BUSY")
            assert int(reply.headers["retry-after"]) >= 1
            assert post(server, HI).status_code == 200
        assert post(server, large).status_code == 200
        never = {**HI, "messages": user("a" * 20_000)}
        error_of(post(server, never), 413, "E-MESSAGE-TOO-LARGE")
        assert server._api._queue.num_bytes == 0


def until(is_met: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while not is_met():
        assert time.monotonic() < give_up, f"in vain waited for: {what}"
        time.sleep(0.001)


def test_a_client_that_leaves_ends_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of 100 tokens is cancelled at its first, and the turn is free."""

    async def leave(server: Server) -> None:
        body = {**HI, "model": "letters", "stream": True, "guided_choice": ["a" * 100]}
        url = f"{server.page_url}v1/chat/completions"
        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S) as client,
            client.stream("POST", url, json=body) as reply,
        ):
            async for _line in reply.aiter_lines():
                return

    with serving(letters_bundle(tmp_path), max_waiting_requests=0) as server:
        held = HeldAnswers(monkeypatch)
        asyncio.run(leave(server))
        until(lambda: not server._api._work, "the end of the request's work")
        held.let_go()
        cancelled = 'edge_vlm_responses_total{status="cancelled"} 1.0'
        metrics = f"{server.page_url}metrics"
        until(
            lambda: cancelled in httpx.get(metrics, timeout=TIMEOUT_S).text,
            "the end of the answer",
        )
        assert post(server, {**HI, "model": "letters", "max_tokens": 2}).status_code == 200


def test_a_server_that_stops_answers_those_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that runs and the one behind it are told; nobody finds a dead socket."""
    body = {**HI, "model": "letters", "guided_choice": ["a" * 100]}
    with serving(letters_bundle(tmp_path)) as server, ThreadPoolExecutor(3) as pool:
        held = HeldAnswers(monkeypatch)
        asked = [pool.submit(post, server, body) for _ in range(2)]
        until(lambda: server._api._queue.num_waiting == 1, "both requests")
        stopped = pool.submit(server.stop, drain_s=0.0)
        for each in asked:
            error_of(each.result(TIMEOUT_S), 503, "E-SERVER-BUSY")
        held.let_go()
        stopped.result(TIMEOUT_S)
