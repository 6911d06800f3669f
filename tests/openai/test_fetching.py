"""Addresses that answer otherwise than they should: what is fetched is whole, or refused."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from edge_vlm.errors.requests import MediaRefused
from edge_vlm_runtime.openai import fetching
from edge_vlm_runtime.openai.fetching import fetch
from edge_vlm_runtime.server.access.tls import self_signed
from tests.openai.served import TIMEOUT_S

BODY = b"x" * 1000
OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
Behave = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def everything_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "is_public", lambda address: True)


@contextmanager
def answering(behave: Behave) -> Iterator[int]:
    """One line that is taken: its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)

        def answer() -> None:
            line, _ = listener.accept()
            line.settimeout(TIMEOUT_S)
            with line, suppress(OSError):
                behave(line)

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def saying(reply: bytes, asked: list[bytes] | None = None) -> Behave:
    def behave(line: socket.socket) -> None:
        request = line.recv(4096)
        if asked is not None:
            asked.extend(request.split(b"\r\n"))
        line.sendall(reply)

    return behave


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (OK + CHUNKED + b"3e8\r\n" + BODY + b"\r\n", "breaks off"),
        (OK + CHUNKED + b"7d0\r\n" + BODY, "breaks off"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "'gzip, chunked'"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(BODY), "in 'gzip'"),
        (OK + b"Content-Length: 0\r\n\r\n", "nothing lies"),
        (b"SSH-2.0-" + b"y" * 5000, "cannot be read: SSH-2.0-y{92}$"),
    ],
    ids=["no last piece", "half a piece", "packed pieces", "packed", "empty", "another protocol"],
)
def test_what_is_not_the_whole_answer_is_refused(reply: bytes, words: str) -> None:
    with answering(saying(reply)) as port, pytest.raises(MediaRefused, match=words):
        fetch(f"http://127.0.0.1:{port}/", param="x", max_bytes=5000)


def test_an_address_is_asked_for_as_a_browser_would() -> None:
    asked: list[bytes] = []
    with answering(saying(OK + b"\r\n" + BODY, asked)) as port:
        url = (
            f"http://127.0.0.1:{port}/a%20b \N{LATIN SMALL LETTER A WITH DIAERESIS}?q=1&r=%41#there"
        )
        assert fetch(url, param="x", max_bytes=5000) == BODY
    assert asked[0] == b"GET /a%20b%20%C3%A4?q=1&r=%41 HTTP/1.1"


def test_a_name_has_several_addresses() -> None:
    with answering(saying(OK + b"\r\n" + BODY)) as port:
        url = f"http://pictures.example:{port}/"
        found = fetch(url, param="x", max_bytes=5000, lookup=lambda *_: ["127.0.0.2", "127.0.0.1"])
    assert found == BODY


def test_a_password_is_not_left_out_unsaid() -> None:
    with pytest.raises(MediaRefused, match="would not be sent"):
        fetch("http://me:secret@127.0.0.1:1/", param="x", max_bytes=5000)


def stall(line: socket.socket) -> None:
    line.recv(4096)
    line.sendall(OK + b"Content-Length: 100\r\n\r\nhalf")
    line.recv(1)


def test_the_end_of_patience_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LONGEST_S", 0.2)
    with answering(stall) as port, pytest.raises(MediaRefused, match="takes more than"):
        fetch(f"http://127.0.0.1:{port}/", param="x", max_bytes=5000)


def slow_greeting(line: socket.socket) -> None:
    """A handshake that never ends, and none of whose waits is long."""
    line.recv(4096)
    for byte in b"\x16\x03\x03\x40\x00" + bytes(1000):
        line.sendall(bytes([byte]))
        threading.Event().wait(0.02)


def test_a_handshake_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "LONGEST_S", 0.3)
    with answering(slow_greeting) as port, pytest.raises(MediaRefused, match="takes more than"):
        fetch(f"https://127.0.0.1:{port}/", param="x", max_bytes=5000)


@pytest.mark.parametrize("says_goodbye", [True, False])
def test_the_end_of_a_secured_line_is_that_of_the_answer_only_if_it_is_said(
    says_goodbye: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = self_signed(tmp_path / "tls", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    asked: list[bytes] = []

    def behave(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True) as secured:
            saying(OK + b"\r\n" + BODY, asked)(secured)
            if says_goodbye:
                secured.unwrap()

    with answering(behave) as port:
        monkeypatch.setitem(fetching._PORTS, "https", port)
        if says_goodbye:
            assert fetch("https://127.0.0.1/", param="x", max_bytes=5000) == BODY
        else:
            with pytest.raises(MediaRefused, match="cannot be read"):
                fetch("https://127.0.0.1/", param="x", max_bytes=5000)
    assert b"Host: 127.0.0.1" in asked  # as browsers say it, and as signed addresses need it
