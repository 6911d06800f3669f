"""Many connections, silent ones, guessed keys and headers of strangers: on real sockets."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from edge_vlm.errors import ConfigError, ServerBusy
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server import asgi_server, connection, site
from edge_vlm_runtime.server.access import doors
from edge_vlm_runtime.server.access.doors import Stage
from edge_vlm_runtime.server.access.tls import self_signed
from edge_vlm_runtime.server.app import Server
from tests.e2e.connections.test_access import raw, upgrade
from tests.e2e.connections.test_hostile_sockets import connect, end_of, frame, told
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.server.live import TIMEOUT_S, open_server, run
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"
PING = 9


def until(is_met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_met():
        assert time.monotonic() < deadline, f"not met: {what}"
        time.sleep(0.005)


def come_from(server: Server, host: str = "127.0.0.1") -> socket.socket:
    at = ("127.0.0.1", server.port)
    return socket.create_connection(at, timeout=TIMEOUT_S, source_address=(host, 0))


def is_cut(plain: socket.socket) -> bool:
    """Whatever it was told before."""
    plain.setblocking(False)
    try:
        while plain.recv(1000):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def doors_of(server: Server) -> doors.Doors:
    return server._site._doors


async def watch(server: Server) -> None:
    async with await Client.connect(server.url, {"delivery": "wait"}) as client:
        await client.send_frame(jpeg(1), 0)
        assert (await client.ask(QUESTION)).status == "completed"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(
        max_connections=12,
        max_sessions=2,
        max_connections_per_address=3,
        max_messages_per_s=1_000_000,
        resume_grace_s=0,
    ) as running:
        # Less room in the kernel for what nobody reads; connections inherit it.
        running._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        running.start()
        yield running
        running.stop()


@pytest.fixture(autouse=True)
def _nobody_is_left(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(site, "LINGER_S", 0.1)
    yield
    until(lambda: doors_of(server).num_visitors == 0, "all connections have ended")
    until(lambda: server._table.num_sessions == 0, "all sessions have ended")


def test_silent_connections_keep_nobody_out(server: Server) -> None:
    async def viewer() -> None:
        async with await Client.connect(server.url, {"delivery": "wait"}) as client:
            with ExitStack() as stack:
                silent = [stack.enter_context(come_from(server)) for _ in range(40)]
                for plain in silent[::3]:
                    plain.sendall(b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgr")
                for plain in silent[1::3]:
                    plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                await client.send_frame(jpeg(1), 0)
                await asyncio.to_thread(run, watch(server))  # somebody new
                assert (await client.ask(QUESTION)).status == "completed"
                assert client.reconnects == 0
                assert doors_of(server).num_visitors <= 12
                assert sum(map(is_cut, silent)) >= 28

    run(viewer())
    assert (
        'edge_vlm_connections_refused_total{reason="full"}'
        in raw(server, "/metrics", "Host: 127.0.0.1")[1]
    )


def test_websockets_without_a_session_give_way(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RESUME_TIMEOUT_S", TIMEOUT_S)  # none goes by itself
    with ExitStack() as stack:
        waiting = []
        for _ in range(12):
            plain = stack.enter_context(come_from(server))
            plain.sendall(
                b"GET /v1/realtime?resume=1 HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                b"Sec-WebSocket-Version: 13\r\n\r\n"
            )
            waiting.append(plain)
        until(lambda: doors_of(server).num_visitors > 6, "some are in")
        for _ in range(2):
            run(watch(server))


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 127.0.0.0/8 but 127.0.0.1 are others' machines."""
    monkeypatch.setattr(doors, "is_loopback", lambda host: host == "127.0.0.1")


@pytest.mark.usefixtures("strangers")
def test_an_address_takes_so_many_places(server: Server) -> None:
    with ExitStack() as stack:
        first = [stack.enter_context(come_from(server, "127.0.0.2")) for _ in range(6)]
        until(lambda: sum(map(is_cut, first)) == 3, "the oldest three are cut")
        stack.enter_context(come_from(server, "127.0.0.3"))
        until(lambda: doors_of(server).num_visitors == 4, "another address has places of its own")
        visitors = list(doors_of(server)._visitors.values())
        for visitor in visitors:
            visitor.stage = Stage.SERVED
        with come_from(server, "127.0.0.2") as refused:
            assert end_of(refused).startswith(b"HTTP/1.1 503 ")
        more = [stack.enter_context(come_from(server, f"127.0.0.{n}")) for n in range(4, 14)]
        until(lambda: sum(map(is_cut, more)) == 5, "three places are this machine's own")
        assert doors_of(server).num_visitors == 9
        run(watch(server))


def test_nobody_who_is_served_is_cut_off(server: Server) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(come_from(server)) for _ in range(12)]
        until(lambda: doors_of(server).num_visitors == 12, "all are in")
        for visitor in list(doors_of(server)._visitors.values()):
            visitor.stage = Stage.SERVED
        with come_from(server) as refused:
            assert end_of(refused).startswith(b"HTTP/1.1 503 ")
        assert not any(map(is_cut, silent))


def test_pings_of_who_reads_nothing_cost_no_memory(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    flood = frame(b"x" * 125, opcode=PING) * 400
    with connect(server, receive_buffer=4096) as plain:
        (visitor,) = doors_of(server)._visitors.values()
        assert visitor.carrier is not None
        plain.settimeout(1.0)
        sent = 0
        with pytest.raises(TimeoutError):  # it is not listened to any more
            while sent < 200e6:
                sent += plain.send(flood)
        assert visitor.carrier.get_write_buffer_size() < 1 << 20
        monkeypatch.setattr(doors, "STALL_S", 0.1)
        plain.settimeout(TIMEOUT_S)
        until(lambda: doors_of(server).num_visitors == 0, "it is cut")
        run(watch(server))


def test_who_was_not_listened_to_is_heard_later(server: Server) -> None:
    """Reading goes on where it stopped."""
    part = {"type": "input_text", "text": ""}
    item = {"type": "message", "role": "user", "content": [part] * 300}
    told_back = frame(json.dumps({"type": "conversation.item.create", "item": item}).encode())
    with connect(server, receive_buffer=4096) as plain:
        (visitor,) = doors_of(server)._visitors.values()
        assert visitor.carrier is not None
        plain.setblocking(False)
        rest = told_back * 60
        rest += frame(b'{"type":"ping","event_id":"at last"}') + frame(b'{"type":"session.close"}')
        data = b""
        has_stopped = False
        deadline = time.monotonic() + TIMEOUT_S
        while b"session.closed" not in data:
            assert time.monotonic() < deadline
            with suppress(BlockingIOError):
                rest = rest[plain.send(rest) :]
            has_stopped = has_stopped or visitor.carrier.get_write_buffer_size() > 1 << 16
            if has_stopped:
                with suppress(BlockingIOError):
                    data += plain.recv(1 << 20)
        assert b"at last" in data


def test_silent_viewers_give_their_places_up(server: Server) -> None:
    def silent() -> socket.socket:
        plain = connect(server)
        told(plain, b"session.created")
        return plain

    def pass_s(seconds: float) -> None:
        for session in server._table.all_sessions:
            session.heard_ns -= int(seconds * 1e9)

    with silent() as first, silent() as second:
        with pytest.raises(ServerBusy, match="2 of 2"):
            run(watch(server))
        pass_s(61.0)
        second.sendall(frame(b'{"type":"alert.list"}'))  # asks
        told(second, b"alert.listed")
        first.sendall(frame(b'{"type":"ping","event_id":"x"}'))  # no sign of somebody who watches
        run(watch(server))
        said = end_of(first)
        (seconds,) = set(re.findall(rb"nothing shown or asked for (\d+) s", said))
        assert 61 <= int(seconds) < 61 + TIMEOUT_S
        assert b"session.closed" in said
        second.sendall(frame(b'{"type":"session.close"}'))
        assert b"closed by the client" in end_of(second)


def test_descriptors_that_run_out(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    plain = [socket.socket() for _ in range(3)]
    early = come_from(server)
    early.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    told(early, b"alive")
    (visitor,) = doors_of(server)._visitors.values()
    until(lambda: visitor.stage is Stage.BETWEEN, "it has been answered")
    visitor.stage = Stage.SERVED
    filling: list[int] = []

    def fill() -> None:
        with pytest.raises(OSError, match="Too many open files") as full:
            while True:
                filling.append(os.dup(0))
        assert full.value.errno == errno.EMFILE

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (doors._num_open() + 30, limits[1]))
        fill()
        for each in plain:
            each.settimeout(TIMEOUT_S)
            each.connect(("127.0.0.1", server.port))
        for each in plain:
            assert end_of(each) == b""  # told at once instead of waiting
        fill()  # other threads of this process may have closed something meanwhile
        early.sendall(b"GET /app.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        data = end_of(early)
        assert data.startswith(b"HTTP/1.1 503 "), data[:200]
        assert b"no more files can be opened" in data
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in filling:
            os.close(descriptor)
        for each in (*plain, early):
            each.close()
    run(watch(server))
    assert "Traceback" not in caplog.text
    said = [each for each in caplog.records if each.name == asgi_server.__name__]
    assert [each.getMessage() for each in said] == [
        "no connection can be taken in: Too many open files; raise the limit of open files "
        "(ulimit -n) or lower --max-connections"
    ]


@pytest.mark.parametrize("origin", ["http://[", "http://a:99999999"])
def test_an_origin_that_cannot_be_read(
    server: Server, origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/", "/metrics", "/v1/models", "/v1/edge_vlm/sessions", "/v1/streams"):
        status, body = raw(server, path, "Host: 127.0.0.1", f"Origin: {origin}")
        assert (status, json.loads(body)["error"]["code"]) == (403, "E-HOST")
    assert upgrade(server, "127.0.0.1", f"Origin: {origin}")[0] == 403
    assert [each for each in caplog.records if each.name != "asyncio"] == []


def test_keys_are_not_guessed_quickly(caplog: pytest.LogCaptureFixture) -> None:
    key = "correct horse battery staple"
    with Server.open(
        tiny_bundle(), threads=1, api_key=key, proxies=["127.0.0.1"], limits=ServerLimits()
    ) as guarded:
        guarded.start()

        def attempt(given: str, host: str, path: str = "/metrics") -> int:
            return raw(
                guarded,
                path,
                *("Host: 127.0.0.1", f"X-Forwarded-For: 8.8.8.8, {host}"),
                f"Authorization: Bearer {given}",
            )[0]

        began = time.monotonic()
        statuses = [attempt(f"guess {n}", "198.51.100.7") for n in range(7)]
        assert statuses == [401] * 7
        assert time.monotonic() - began >= 1.9  # the last two waited for a second each
        assert attempt(key, "198.51.100.8") == 200
        page = raw(guarded, "/metrics", "Host: 127.0.0.1", f"Authorization: Bearer {key}")[1]
        assert 'edge_vlm_keys_refused_total{outcome="wrong"} 7' in page
        guessed = f"Authorization: Bearer {key}x", "X-Forwarded-For: 198.51.100.9"
        assert upgrade(guarded, "127.0.0.1", *guessed)[0] == 101  # is told by an event
        until(lambda: "198.51.100.9" in caplog.text, "whose key it was is logged")
    assert key not in caplog.text
    assert "8.8.8.8" not in caplog.text


def test_words_of_strangers_cut_nobody_else(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a proxy that is trusted the headers are words."""
    with connect(server) as victim:
        _, port = victim.getsockname()
        headers = f"X-Forwarded-For: 127.0.0.1:{port}", f"Forwarded: for=127.0.0.1:{port}"
        assert upgrade(server, "127.0.0.1", *headers)[0] == 101
        until(lambda: server._table.num_sessions <= 1, "the other one has gone")
        victim.sendall(frame(b'{"type":"ping","event_id":"still here"}'))
        told(victim, b"still here")


def test_half_a_handshake_of_tls_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi_server, "HANDSHAKE_S", 0.2)
    made = self_signed(tmp_path, ["127.0.0.1"])
    with Server.open(
        tiny_bundle(), threads=1, tls=made, limits=ServerLimits(max_connections=8)
    ) as secured:
        secured.start()
        with ExitStack() as stack:
            half = [stack.enter_context(come_from(secured)) for _ in range(20)]
            for plain in half:
                plain.sendall(b"\x16\x03\x01\x02\x00")
            until(lambda: all(map(is_cut, half)), "all are cut, at once or after a while")
        until(lambda: doors_of(secured).num_visitors == 0, "no place is taken")
        monkeypatch.setattr(asgi_server, "HANDSHAKE_S", TIMEOUT_S)  # a slow one is no half
        context = ssl.create_default_context(cafile=str(made.certificate))
        with (
            come_from(secured) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            wrapped.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert wrapped.recv(100).startswith(b"HTTP/1.1 200 ")


def test_more_sessions_than_connections_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least max_sessions, 4, got 3"):
        open_server(max_connections=3)
