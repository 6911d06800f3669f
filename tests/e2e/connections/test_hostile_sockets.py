"""Raw TCP against a running server: what no websocket library would send."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import edge_vlm_runtime.server.site
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.server import asgi_server
from edge_vlm_runtime.server.access import doors
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.server.live import TIMEOUT_S, open_server, run
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"
TEXT = 1


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(
        max_message_bytes=50_000, max_sessions=2, max_replay_events=300, resume_grace_s=0
    ) as running:
        # Less room in the kernel for what nobody reads; connections inherit it.
        running._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        running.start()
        yield running


@pytest.fixture(autouse=True)
def _a_viewer_can_still_watch(server: Server) -> Iterator[None]:
    yield

    async def viewer() -> None:
        async with await Client.connect(server.url, {"delivery": "wait"}) as client:
            await client.send_frame(jpeg(1), 0)
            assert (await client.ask(QUESTION)).status == "completed"

    run(viewer())
    with urllib.request.urlopen(f"{server.page_url}healthz") as reply:
        assert reply.status == 200


def frame(payload: bytes, opcode: int = TEXT, *, final: bool = True, masked: bool = True) -> bytes:
    """One websocket frame of a client (RFC 6455, 5.2)."""
    head = bytes([opcode | (0x80 if final else 0)])
    flag = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes([flag | len(payload)])
    elif len(payload) < 1 << 16:
        head += bytes([flag | 126]) + struct.pack(">H", len(payload))
    else:
        head += bytes([flag | 127]) + struct.pack(">Q", len(payload))
    if not masked:
        return head + payload
    mask = os.urandom(4)
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    return upgraded(ask_to_talk(server, receive_buffer))


def ask_to_talk(server: Server, receive_buffer: int | None = None) -> socket.socket:
    plain = socket.socket()
    plain.settimeout(TIMEOUT_S)
    if receive_buffer is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    plain.connect(("127.0.0.1", server.port))
    plain.sendall(
        b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    return plain


def upgraded(plain: socket.socket) -> socket.socket:
    answer = told(plain, b"\r\n\r\n", at_a_time=1)  # nothing may be sent before
    assert answer.startswith(b"HTTP/1.1 101 ")
    return plain


def told(plain: socket.socket, words: bytes, at_a_time: int = 1 << 16) -> bytes:
    """All that comes up to these words."""
    data = b""
    while words not in data:
        piece = plain.recv(at_a_time)
        assert piece, f"closed before {words!r}: {data[-200:]!r}"
        data += piece
    return data


def end_of(plain: socket.socket) -> bytes:
    """Everything the server still sends before it closes."""
    data = b""
    try:
        while piece := plain.recv(1 << 16):
            data += piece
    except OSError:
        pass
    return data


@contextmanager
def standing(server: Server) -> Iterator[None]:
    """The server does nothing meanwhile. What is sent to it lies there when it begins to count a
    connection's time, however long a busy machine takes to send it."""
    stands, goes_on = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        assert goes_on.wait(TIMEOUT_S)

    assert server._loop is not None
    server._loop.call_soon_threadsafe(stand)
    assert stands.wait(TIMEOUT_S)
    try:
        yield
    finally:
        goes_on.set()


@pytest.mark.parametrize(
    ("what", "code"),
    [
        (frame(b"\xff\xfe not utf-8"), 1007),
        (frame(b"half of a letter: \xc3"), 1007),
        (frame(b"{}", masked=False), 1002),
        (frame(b"{}", opcode=0), 1002),
        (frame(b"{}", opcode=5), 1002),
        (b"\xc1\x80\x00\x00\x00\x00", 1002),  # compressed, which was not agreed on
        (bytes([0x81, 0xFF]) + struct.pack(">Q", 1 << 40) + bytes(4), 1009),
        (bytes([0x81, 0xFF]) + b"\xff" * 12, 1009),
        (frame(b"{", final=False) + frame(b"x" * 200, 9), 1002),  # a ping above 125 bytes
    ],
    ids=range(9),
)
def test_broken_websocket_frames(server: Server, what: bytes, code: int) -> None:
    with connect(server) as plain:
        plain.sendall(what)
        data = end_of(plain)
    assert struct.pack(">H", code) in data[-140:]


def test_a_message_in_a_thousand_pieces_is_one_message(server: Server) -> None:
    text = json.dumps({"type": "ping", "event_id": "pieces"}).encode()
    with connect(server) as plain:
        for index in range(len(text)):
            opcode = TEXT if index == 0 else 0
            plain.sendall(frame(text[index : index + 1], opcode, final=index == len(text) - 1))
        data = told(plain, b'"type":"pong"')
    assert b'"event_id":"pieces"' in data


@pytest.mark.parametrize(
    "garbage",
    [b"\x00" * 1000, b"GE\x00T / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(500), b"A" * 200_000],
    ids=range(4),
)
def test_bytes_that_are_no_http(server: Server, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S) as plain:
        try:
            plain.sendall(garbage)
        except OSError:
            return  # refused before it was all sent
        assert b" 200 " not in end_of(plain)[:30]


def test_connections_that_say_nothing_cost_no_session(server: Server) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for plain in silent[10:]:
        plain.sendall(b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgr")
    run(_watch(server))
    for plain in silent:
        plain.close()


def test_headers_that_stop_half_way_are_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi_server, "HEADERS_S", 0.2)
    at = ("127.0.0.1", server.port)
    half, whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A", b"GET /healthz HTTP/1.1\r\n"
    with standing(server):
        plain = socket.create_connection(at, timeout=TIMEOUT_S)
        plain.sendall(half)
    with plain:
        assert end_of(plain).startswith(b"HTTP/1.1 408 ")
    with standing(server):
        plain = socket.create_connection(at, timeout=TIMEOUT_S)
        plain.sendall(whole + b"Host: 127.0.0.1\r\n\r\n" + half)  # behind a whole one
    with plain:
        data = end_of(plain)
        assert data.startswith(b"HTTP/1.1 200 OK")
        assert b"HTTP/1.1 408 " in data
    with standing(server):
        asked = ask_to_talk(server)
    with upgraded(asked) as websocket:
        with socket.create_connection(at, timeout=TIMEOUT_S) as plain:
            assert end_of(plain) == b""  # nothing was asked
        websocket.sendall(frame(b'{"type":"ping","event_id":"still here"}'))
        told(websocket, b'"event_id":"still here"')  # or it was closed, too


def test_a_small_body_that_does_not_come_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_vlm_runtime.server.site, "BODY_S", 0.2)
    head = b"POST /v1/edge_vlm/sessions/x/alerts HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S) as plain:
        plain.sendall(head + b"Content-Length: 20\r\n\r\n{")
        assert plain.recv(1000).startswith(b"HTTP/1.1 408 ")


async def _watch(server: Server) -> None:
    async with await Client.connect(server.url, {"delivery": "wait"}) as client:
        await client.send_frame(jpeg(1), 0)
        assert (await client.ask(QUESTION)).status == "completed"


def test_a_client_that_never_reads_is_cut_off_with_bounded_memory(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "STALL_S", 0.3)
    unknown = json.dumps({"type": "ping", "f" * 900: 1}).encode()  # repeated in the error
    flood = b"".join(frame(unknown) for _ in range(200))
    while server._table._sessions:  # of the test before
        time.sleep(0.005)
    with connect(server, receive_buffer=4096) as plain:
        while not server._table._sessions:
            time.sleep(0.005)
        (served,) = server._table._sessions.values()
        most = 0
        deadline = time.monotonic() + TIMEOUT_S
        with pytest.raises(ConnectionError):  # cut off while it still talks
            while True:
                assert time.monotonic() < deadline
                plain.sendall(flood)
                most = max(most, served.log.num_bytes)
        while server._table._sessions:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        most = max(most, served.log.num_bytes)  # it may be cut off while it first talks
    assert 0 < most <= 301 * 1500


# ---- bounds of what one connection may cost --------------------------------------------------

PING, TINY = frame(b"x" * 125, 9), frame(b"{}")


def wait_until(is_met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_met():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def carrier_of(server: Server, plain: socket.socket) -> Any:
    """The server's side of this websocket; those of others may still be closing."""
    (found,) = (
        each
        for each in list(server._carrier.server_state.connections)
        if each.transport.get_extra_info("peername") == plain.getsockname()
    )
    assert hasattr(found, "_cutter")
    return found


def test_pings_that_nobody_hears_the_answers_of_cost_bounded_memory(server: Server) -> None:
    wait_until(lambda: not server._table._sessions, "the test before")
    with connect(server, receive_buffer=4096) as plain:
        wait_until(lambda: bool(server._table._sessions), "a session")
        carrier = carrier_of(server, plain)
        plain.setblocking(False)
        rest = b""

        def send_more() -> None:
            nonlocal rest
            rest = rest or PING * 1000
            with suppress(BlockingIOError):
                rest = rest[plain.send(rest) :]

        def is_held_for_good() -> bool:
            send_more()
            return carrier._is_held and not carrier.writable.is_set()

        wait_until(is_held_for_good, "its answers cannot be written")
        deadline = time.monotonic() + TIMEOUT_S
        while select.select([], [plain], [], 1.0)[1]:  # until the server reads no more of them
            assert time.monotonic() < deadline
            send_more()
        assert carrier._is_held
        assert carrier.transport.get_write_buffer_size() < 1 << 18
        assert carrier._cutter.num_bytes < 1 << 20
        run(_watch(server))


def test_many_small_messages_are_worked_on_at_a_rate(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the rate stays in the socket; none is lost."""
    number = server.limits.max_messages_per_s
    with connect(server) as plain:
        carrier = carrier_of(server, plain)
        hold, holds = carrier._hold, threading.Event()

        def noted_hold() -> None:
            holds.set()  # for it is over by and by
            hold()

        monkeypatch.setattr(carrier, "_hold", noted_hold)
        plain.sendall(TINY * number + frame(b'{"type":"ping","event_id":"behind"}'))
        assert holds.wait(TIMEOUT_S)
        data = told(plain, b'"event_id":"behind"')
    assert data.count(b"E-PROTOCOL") == number


def test_who_talks_on_after_the_goodbye_is_cut_off(server: Server) -> None:
    close = frame(b'{"type":"session.close"}')
    for flood in (TINY * 2000, frame(bytes(100_000), 2), PING * 500):
        with connect(server) as plain:
            plain.sendall(close)
            told(plain, struct.pack(">H", 1000))
            deadline = time.monotonic() + TIMEOUT_S
            with pytest.raises(ConnectionError):
                while True:
                    assert time.monotonic() < deadline
                    plain.sendall(flood)


def test_a_stranger_is_told_so_and_cut_off_however_much_it_says() -> None:
    with Server.open(tiny_bundle(), threads=1, api_key="secret") as locked:
        locked.start()
        with connect(locked) as plain:
            deadline = time.monotonic() + TIMEOUT_S
            with pytest.raises(ConnectionError):
                while True:
                    assert time.monotonic() < deadline
                    plain.sendall(TINY * 1000)
        with connect(locked) as plain:  # one that listens is told
            told(plain, b"E-UNAUTHORIZED")
        assert not locked._table._sessions
