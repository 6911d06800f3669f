from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import ConfigError, Unauthorized
from edge_vlm_runtime.server.access.auth import VARIABLE, read_api_key
from edge_vlm_runtime.server.access.keys import KeyCheck
from tests.runtime.server.live import run

KEY = "correct horse battery staple"


def scope(path: str = "/v1/realtime", authorization: bytes | None = None, *protocols: str) -> Any:
    headers = [] if authorization is None else [(b"Authorization", authorization)]
    return {"path": path, "headers": headers, "subprotocols": list(protocols)}


def require_key(key: str | None, scope: Any) -> None:
    run(KeyCheck(key).require(scope))


def in_subprotocol(key: str) -> str:
    return "edge-vlm-key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "allowed",
    [
        scope(authorization=f"Bearer {KEY}".encode()),
        scope(authorization=f"bearer  {KEY} ".encode()),
        scope("/v1/realtime", None, "edge-vlm", in_subprotocol(KEY)),
        scope("/metrics", f"Bearer {KEY}".encode()),
        *(scope(path) for path in ("/", "/app.js", "/healthz", "/readyz", "/version")),
    ],
)
def test_who_has_the_key_may_pass_and_the_page_is_open(allowed: Any) -> None:
    require_key(KEY, allowed)


@pytest.mark.parametrize(
    "refused",
    [
        scope(),
        scope("/v1/chat/completions"),
        scope("/metrics"),
        scope("/demo/street.jpg"),
        scope(authorization=b"Bearer"),
        scope(authorization=b"Bearer wrong"),
        scope(authorization=f"Basic {KEY}".encode()),
        scope(authorization=f"Bearer {KEY}x".encode()),
        scope("/v1/realtime", None, "edge-vlm-key.wrong"),
        scope("/v1/realtime", None, "edge-vlm-key.*"),
        scope("/v1/realtime", None, "edge-vlm-key."),
        scope("/v1/realtime", None, in_subprotocol(KEY[:-1])),
    ],
)
def test_others_may_not(refused: Any) -> None:
    with pytest.raises(Unauthorized, match=VARIABLE):
        require_key(KEY, refused)
    require_key(None, refused)  # a server without a key is open


@given(st.binary(max_size=40), st.text(max_size=30))
def test_nothing_a_client_sends_breaks_it(header: bytes, protocol: str) -> None:
    with pytest.raises(Unauthorized):
        require_key(KEY, scope("/v1/realtime", b"Bearer " + header, f"edge-vlm-key.{protocol}"))


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_api_key(file, {VARIABLE: "other"}) == KEY
    assert read_api_key(None, {VARIABLE: "other"}) == "other"
    assert read_api_key(None, {VARIABLE: ""}) is None
    assert read_api_key(None, {}) is None
    assert read_api_key(None, {VARIABLE: f"{KEY}\n"}) == KEY  # as of a secret's file
    for text in (" ", "two\nlines", "schlüssel"):
        with pytest.raises(ConfigError, match=VARIABLE):
            read_api_key(None, {VARIABLE: text})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(tmp_path / "nothing", {})
    for content in (b"", b"\n", b"two\nlines", "schlüssel".encode(), b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=str(file)):
            read_api_key(file, {})
