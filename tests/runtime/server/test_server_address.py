"""How a server may be called."""

from __future__ import annotations

import pytest

from edge_vlm.errors import ConfigError, ServerUnreachable
from edge_vlm_runtime import connect, protocol
from edge_vlm_runtime.client.address import PATH, http_url, is_address, websocket_url
from tests.runtime.server.live import run

FORMS = {
    "jetson:8765": ("ws://jetson:8765/v1/realtime", "http://jetson:8765/v1/models"),
    "jetson": ("ws://jetson:8765/v1/realtime", "http://jetson:8765/v1/models"),
    "127.0.0.1:1/": ("ws://127.0.0.1:1/v1/realtime", "http://127.0.0.1:1/v1/models"),
    "[::1]:9": ("ws://[::1]:9/v1/realtime", "http://[::1]:9/v1/models"),
    " http://cam ": ("ws://cam/v1/realtime", "http://cam/v1/models"),
    "http://cam:1/v1": ("ws://cam:1/v1/realtime", "http://cam:1/v1/models"),
    "https://cam/yard/": ("wss://cam/yard/v1/realtime", "https://cam/yard/v1/models"),
    "HTTPS://cam/yard": ("wss://cam/yard/v1/realtime", "https://cam/yard/v1/models"),
    "ws://cam:1/v1/realtime": ("ws://cam:1/v1/realtime", "http://cam:1/v1/models"),
    "ws://cam:1/v1/realtime?model=a": (
        "ws://cam:1/v1/realtime?model=a",
        "http://cam:1/v1/models",
    ),
    "cam:1/v1": ("ws://cam:1/v1/realtime", "http://cam:1/v1/models"),
    "cam:1/yard": ("ws://cam:1/yard/v1/realtime", "http://cam:1/yard/v1/models"),
    "ws://cam:1/v1": ("ws://cam:1/v1/realtime", "http://cam:1/v1/models"),
    "http://cam#top": ("ws://cam/v1/realtime", "http://cam/v1/models"),
    "wss://cam:1": ("wss://cam:1/v1/realtime", "https://cam:1/v1/models"),
    "ws://cam:1/elsewhere": ("ws://cam:1/elsewhere", "http://cam:1/elsewhere/v1/models"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form(form: str) -> None:
    assert (websocket_url(form), http_url(form, "/v1/models")) == FORMS[form]
    assert is_address(form) == (form != "jetson")  # a question may be one word


@pytest.mark.parametrize(
    "text", ["What is there now?", "what:", "time 12:30", "is it http://a?", "", "Cars?", "e.g."]
)
def test_a_question_is_no_address(text: str) -> None:
    assert not is_address(text)


@pytest.mark.parametrize(
    "form",
    ["", " ", "ftp://cam", "file:///cam", "cam:port", "cam:99999", "::1", "http://", "a b:1"],
)
def test_what_is_none(form: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        websocket_url(form)


def test_a_password_in_an_address_is_not_repeated() -> None:
    async def scenario() -> None:
        async with connect("ws://me:hunter2@127.0.0.1:9"):
            pass

    with pytest.raises(ServerUnreachable) as caught:
        run(scenario())
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        websocket_url("ftp://me:hunter2@cam")
    assert "hunter2" not in str(refused.value)


def test_a_variable_that_is_not_set() -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        websocket_url(None)  # type: ignore[arg-type]


def test_the_path_is_that_of_the_protocol() -> None:
    assert PATH == protocol.PATH


@pytest.mark.parametrize(
    "text", ["192.168.1.20", "localhost", "[::1]", "jetson.local", "host:8765?x=1"]
)
def test_an_address_without_a_port(text: str) -> None:
    assert is_address(text)
