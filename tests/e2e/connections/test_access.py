"""TLS, API key and metrics of a running server."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    HostNotAllowed,
    ServerUnreachable,
    Unauthorized,
)
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.server.access.hosts import allowed_hosts, require_host
from edge_vlm_runtime.server.access.tls import self_signed
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.seen import Seen
from tests.runtime.server.live import TIMEOUT_S, run
from tests.tiny import tiny_bundle

KEY = "correct horse battery staple"
QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"), ["127.0.0.1", "localhost"]).certificate


@pytest.fixture(scope="module")
def server(certificate: Path) -> Iterator[Server]:
    made = self_signed(certificate.parent, ["127.0.0.1", "localhost"])
    with Server.open(tiny_bundle(), threads=1, api_key=KEY, tls=made) as running:
        running.start()
        yield running


def get(server: Server, path: str, certificate: Path, key: str | None = None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(server.page_url.rstrip("/") + path, headers=headers)
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        with urllib.request.urlopen(request, context=context) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_session_over_tls_with_the_key(server: Server, certificate: Path) -> None:
    async def session() -> None:
        access = Access(api_key=KEY, ca_file=certificate)
        async with await Client.connect(server.url, {"delivery": "wait"}, access=access) as client:
            await client.send_frame(jpeg(1), 0)
            await client.wait_processed()
            assert (await client.ask(QUESTION)).status == "completed"
            client._line._connection.transport.abort()
            assert (await client.ask(QUESTION)).status == "completed"
            assert client.reconnects == 1  # with key and certificate

    assert server.url.startswith("wss://")
    assert server.page_url.startswith("https://")
    run(session())


def test_without_the_key_or_the_certificate(
    server: Server, certificate: Path, tmp_path: Path
) -> None:
    async def attempt(access: Access) -> None:
        await Client.connect(server.url, access=access)

    for key in (None, "wrong"):
        with pytest.raises(Unauthorized, match="API key"):
            run(attempt(Access(api_key=key, ca_file=certificate)))
    with pytest.raises(ServerUnreachable, match="certificate"):
        run(attempt(Access(api_key=KEY)))
    (tmp_path / "text.pem").write_text("hello")
    for path in (tmp_path / "text.pem", tmp_path / "nothing.pem"):
        with pytest.raises(ConfigError, match=str(path)):
            run(attempt(Access(api_key=KEY, ca_file=path)))


def test_a_page_gives_the_key_as_a_subprotocol(server: Server, certificate: Path) -> None:
    async def attempt(key: str) -> tuple[str | None, str]:
        offered = "edge-vlm-key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
        context = ssl.create_default_context(cafile=str(certificate))
        protocols = [websockets.Subprotocol(name) for name in ("edge-vlm", offered)]
        async with connect(server.url, ssl=context, subprotocols=protocols) as raw:
            first = json.loads(await raw.recv())
            if first["type"] == "error":
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await raw.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1008
                return raw.subprotocol, first["error"]["code"]
            return raw.subprotocol, first["type"]

    assert run(attempt(KEY)) == ("edge-vlm", "session.created")
    assert run(attempt("wrong")) == ("edge-vlm", "E-UNAUTHORIZED")


def test_http_with_and_without_the_key(server: Server, certificate: Path) -> None:
    for path in ("/", "/app.js", "/healthz", "/readyz", "/version"):
        assert get(server, path, certificate)[0] == 200
    for key in (None, "wrong"):
        status, text = get(server, "/metrics", certificate, key)
        assert status == 401
        assert json.loads(text)["error"]["code"] == "E-UNAUTHORIZED"
        assert get(server, "/v1/models", certificate, key)[0] == 401
    assert get(server, "/metrics", certificate, KEY)[0] == 200
    assert get(server, "/v1/nothing", certificate, KEY)[0] == 404


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with Server.open(tiny_bundle(), threads=1, hosts=["camera.example.org"]) as running:
        running.start()
        yield running


def raw(server: Server, path: str, *headers: str) -> tuple[int, str]:
    """Status and body that raw bytes get."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S) as connection:
        lines = [f"GET {path} HTTP/1.1", "Connection: close", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        return reply.status, "" if reply.status == 101 else reply.read().decode()


def upgrade(server: Server, host: str, *headers: str) -> tuple[int, str]:
    key = base64.b64encode(bytes(16)).decode()
    return raw(
        server,
        "/v1/realtime",
        f"Host: {host}",
        *headers,
        *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
        f"Sec-WebSocket-Key: {key}",
    )


OWN = socket.gethostname().partition(".")[0]


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1:PORT", "localhost:PORT", "LocalHost", "localhost.:9000", "[::1]:PORT"),
        *("192.168.1.20:PORT", "[fe80::1]", "10.0.0.3", f"{OWN}:PORT", f"{OWN}.local:PORT"),
        *("camera.example.org:PORT", "Camera.Example.Org."),
    ],
)
def test_names_that_the_server_answers_to(plain: Server, host: str) -> None:
    """What a person in the local network types, through a forwarded port too."""
    host = host.replace("PORT", str(plain.port))
    assert raw(plain, "/metrics", f"Host: {host}")[0] == 200
    assert upgrade(plain, host, f"Origin: http://{host}")[0] == 101


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example:PORT", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("example.org", "a.camera.example.org", "127.0.0.1:PORT@evil.example", "1.2.3", "", "*"),
        *("[evil.example]:PORT", "localhost:PORT.evil.example:80", "b\u00fcro.local"),
    ],
)
def test_a_name_that_somebody_else_points_here_is_refused(plain: Server, host: str) -> None:
    """DNS rebinding: to the browser this page and the server are of one origin."""
    host = host.replace("PORT", str(plain.port))
    for path in ("/", "/metrics", "/version", "/nothing"):
        status, body = raw(plain, path, f"Host: {host}")
        assert status == 403
        assert json.loads(body)["error"]["code"] == "E-HOST"
    status, body = upgrade(plain, host, f"Origin: http://{host}")
    assert (status, json.loads(body)["error"]["code"]) == (403, "E-HOST")
    assert "--allowed-host" in body
    assert upgrade(plain, host)[0] == 403  # and without any page


def test_one_good_host_does_not_excuse_another(plain: Server) -> None:
    assert upgrade(plain, "127.0.0.1", "Host: evil.example")[0] in (400, 403)
    assert raw(plain, "/", "Host: 127.0.0.1", "Host: evil.example")[0] in (400, 403)


def test_our_client_says_why_the_name_is_refused(
    plain: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a name of /etc/hosts, or of a container."""
    resolve = socket.getaddrinfo

    def local(host: str, *args: Any, **kwargs: Any) -> Any:
        return resolve("127.0.0.1" if host == "my-camera" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local)

    async def attempt() -> None:
        await Client.connect(f"ws://my-camera:{plain.port}/v1/realtime")

    with pytest.raises(HostNotAllowed, match=r"'my-camera:.*--allowed-host"):
        run(attempt())


def test_all_names_may_be_allowed() -> None:
    scope = {"headers": [(b"host", b"evil.example:80")]}
    require_host(allowed_hosts("127.0.0.1", ["*"]), scope)
    with pytest.raises(HostNotAllowed):
        require_host(allowed_hosts("127.0.0.1"), scope)
    require_host(allowed_hosts("camera.lan"), {"headers": [(b"host", b"camera.lan:8765")]})
    require_host(allowed_hosts("127.0.0.1"), {"headers": []})  # HTTP/1.0: no browser


@pytest.mark.parametrize("name", ["", "http://camera", "camera:8765", "a/b", "a b", "b\u00fcro"])
def test_what_is_no_name_of_a_host(name: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a host"):
        allowed_hosts("127.0.0.1", [name])


def test_the_page_and_its_headers(plain: Server, caplog: pytest.LogCaptureFixture) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/index.html", "text/html"),
        ("/app.js", "text/javascript"),
        ("/line.js", "text/javascript"),
        ("/points.js", "text/javascript"),
        ("/style.css", "text/css"),
    ):
        with urllib.request.urlopen(plain.page_url.rstrip("/") + path) as reply:
            assert reply.headers["Content-Type"] == f"{kind}; charset=utf-8"
            assert reply.headers["Cache-Control"] == "no-cache"
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
            tag = f"If-None-Match: {reply.headers['ETag']}"
        assert raw(plain, path, "Host: 127.0.0.1", tag) == (304, "")
    for path in ("/nothing", "/../app.py", "/%2e%2e/app.py", "//etc/passwd", "/app.js%00.html"):
        assert raw(plain, path, "Host: 127.0.0.1")[0] == 404
    assert raw(plain, "/healthz/", "Host: 127.0.0.1")[0] == 307
    headers = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    nonce = f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}"
    assert raw(plain, "/nothing", "Host: 127.0.0.1", *headers, nonce)[0] == 403
    # asyncio's are about callbacks that took long, on a busy machine
    assert [each for each in caplog.records if each.name != "asyncio"] == []


def test_sessions_begin_with_what_the_server_was_told() -> None:
    async def session(server: Server) -> None:
        async with await Client.connect(server.url) as client:
            assert client.created.settings.keep_ratio == 0.25
            assert client.created.settings.instructions == "Answer in one word."

    settings = {"keep_ratio": 0.25, "instructions": "Answer in one word."}
    with Server.open(tiny_bundle(), threads=1, settings=settings) as server:
        server.start()
        run(session(server))
    with pytest.raises(ConfigError, match="keep_ratio must be in"):
        Server.open(tiny_bundle(), threads=1, settings={"keep_ratio": 2})


def test_metrics_count_what_sessions_do(certificate: Path) -> None:
    def value(page: str, name: str) -> float:
        (line,) = [line for line in page.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])

    async def session(server: Server) -> str:
        seen = Seen()
        async with await Client.connect(server.url, {"delivery": "wait"}, on_event=seen) as client:
            for number in range(3):
                await client.send_frame(jpeg(number), number * 500_000)
                await client.wait_processed()  # or they would join the memory in one prefill
            await client.send_frame(b"junk", 2_000_000)
            await client.wait_processed()
            await client.ask(QUESTION)
            with pytest.raises(EdgeVlmError):
                await client.update({"keep_ratio": 7})
            page = (await asyncio.to_thread(get, server, "/metrics", certificate))[1]
            assert value(page, "edge_vlm_vision_cells_kept_total") == client.frames.cells_kept
            assert value(page, "edge_vlm_sessions_active") == 1
            assert value(page, "edge_vlm_kv_tokens") == seen.accepted[3].kv_tokens
            return page

    with Server.open(tiny_bundle(), threads=1) as server:
        server.start()
        page = run(session(server))
        after = get(server, "/metrics", certificate)[1]
    assert value(page, "edge_vlm_frames_received_total") == 4
    assert value(page, "edge_vlm_frames_processed_total") == 3
    assert value(page, 'edge_vlm_frames_dropped_total{reason="decode_error"}') == 1
    assert value(page, "edge_vlm_vision_cells_seen_total") == 27
    assert value(page, "edge_vlm_time_to_first_token_seconds_count") == 1
    assert value(page, "edge_vlm_response_duration_seconds_count") == 1
    assert value(page, 'edge_vlm_responses_total{status="completed"}') == 1
    assert value(page, 'edge_vlm_errors_total{code="E-CONFIG"}') == 1
    for stage in ("decode", "preprocess", "vit_stem", "vit_trunk", "prefill"):
        name = f'edge_vlm_frame_stage_seconds_count{{stage="{stage}"}}'
        assert value(page, name) == 3
    assert value(after, "edge_vlm_sessions_active") == value(after, "edge_vlm_kv_tokens") == 0
    assert value(after, "edge_vlm_process_resident_memory_bytes") > 10e6
