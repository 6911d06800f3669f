"""TLS, API key and metrics of a running server."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect

from edge_vlm.errors import ConfigError, EdgeVlmError, ServerUnreachable, Unauthorized
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.server.tls import self_signed
from tests.runtime.live import run
from tests.runtime.pictures import jpeg
from tests.runtime.seen import Seen
from tests.tiny import tiny_bundle

KEY = "correct horse battery staple"
QUESTION = "is there a red ball ?"
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


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

    assert server.url.startswith("wss://") and server.page_url.startswith("https://")
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
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
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
