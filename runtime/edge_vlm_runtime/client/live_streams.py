"""Streams that somebody else shows to a server: looked at and asked over HTTP, without a session.

Each call blocks until it is answered.
"""

from __future__ import annotations

import http.client
import json
import math
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from edge_vlm.errors import ConfigError, ProtocolError, ServerUnreachable
from edge_vlm.json_text import MALFORMED, fault_of, parse_json
from edge_vlm_runtime.client.address import http_url
from edge_vlm_runtime.client.connection import Access, error_from_detail
from edge_vlm_runtime.protocol.messages import ErrorDetail
from edge_vlm_runtime.sources.masking import mask_credentials

SESSIONS = "/v1/edge_vlm/sessions"
MOST_BYTES = 32 << 20
"""Of an answer; the largest is a picture."""
TIMEOUT_S = 120.0
"""Of an answer; the longest wait for an event is half of it."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The newest picture that the model was shown."""

    jpeg: bytes
    frame_sequence: int
    time_s: float
    """Capture time since the stream's first frame."""
    age_s: float
    """Since it arrived."""


class _StaysHere(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: the key would go along to wherever it leads."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class LiveStreams:
    """Those of one server. Raises ServerUnreachable, Unauthorized, ProtocolError, and what the
    server says instead of an answer."""

    def __init__(self, url: str, access: Access | None = None) -> None:
        """`url`: see `address`. Raises ConfigError."""
        self.url = url
        http_url(url, SESSIONS)
        access = access or Access()
        self._headers = {}
        if access.api_key is not None:
            self._headers["Authorization"] = f"Bearer {access.api_key}"
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.ProxyHandler({}),
            _StaysHere(),
        ]
        if access.ca_file is not None:
            try:
                trusted = ssl.create_default_context(cafile=access.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"not a certificate ({error})", where=access.ca_file) from error
            handlers.append(urllib.request.HTTPSHandler(context=trusted))
        self._opener = urllib.request.build_opener(*handlers)

    def sessions(self) -> list[dict[str, Any]]:
        """What `GET /v1/edge_vlm/sessions` lists, see docs/protocol.md."""
        return _objects(self._json(SESSIONS), "data")

    def ask(self, session_id: str, question: str, detail: str = "video") -> str:
        """The answer to a question about a stream. `detail`: video, snapshot or both."""
        with _answers_read():
            answer = self._json(
                "/v1/chat/completions",
                {
                    "model": str(self._json("/v1/models")["data"][0]["id"]),
                    "messages": [{"role": "user", "content": question}],
                    "edge_vlm": {"session": session_id, "detail": detail},
                },
            )
            return str(answer["choices"][0]["message"]["content"])

    def snapshot(self, session_id: str) -> Snapshot:
        """Raises NoFrameYet."""
        jpeg, headers = self._get(f"{_path(session_id)}/snapshot")
        with _answers_read():
            return Snapshot(
                jpeg=jpeg,
                frame_sequence=int(headers["X-Edge-Vlm-Frame"]),
                time_s=_finite(headers["X-Edge-Vlm-Time-S"]),
                age_s=_finite(headers["X-Edge-Vlm-Age-S"]),
            )

    def alerts(self, session_id: str) -> list[dict[str, Any]]:
        """Where they stand: `AlertStatus`, see docs/protocol.md."""
        return _objects(self._json(f"{_path(session_id)}/alerts"), "alerts")

    def create_alert(self, session_id: str, question: str) -> dict[str, Any]:
        """Watches for something more. Raises as `Client.create_alert`."""
        return self._json(f"{_path(session_id)}/alerts", {"question": question})

    def events(self, session_id: str, after: int = 0, wait_s: float = 0.0) -> dict[str, Any]:
        """`events`, the begins and ends of alerts behind number `after`; without any, those of the
        next `wait_s` seconds, 60 at most. `newest_event` is the number to go on from."""
        query = urlencode({"after": after, "wait_s": wait_s})
        return self._json(f"{_path(session_id)}/events?{query}")

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data, _ = self._get(path, None if body is None else json.dumps(body).encode())
        try:
            found = parse_json(data)
        except ValueError as error:
            raise ProtocolError(f"the server's answer is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ProtocolError("the server's answer is no JSON object")
        return found

    def _get(self, path: str, body: bytes | None = None) -> tuple[bytes, Mapping[str, str]]:
        url = http_url(self.url, path)
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as reply:
                return _whole(reply), reply.headers
        except urllib.error.HTTPError as error:
            with error:
                raise _told(error.code, _whole(error), url) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(
                f"no edge-vlm server answers: {getattr(error, 'reason', error)}",
                where=self.url,
                remedy="start `edge-vlm serve`",
            ) from error


def _whole(reply: Any) -> bytes:
    """Raises ProtocolError for an answer without end, or that takes too long to come."""
    end_s, read = time.monotonic() + TIMEOUT_S, bytearray()
    while part := reply.read1(1 << 16):
        read += part
        if len(read) > MOST_BYTES or time.monotonic() > end_s:
            raise ProtocolError(
                f"the server's answer does not end: {len(read)} bytes in {TIMEOUT_S:g} s at most",
                remedy=f"up to {MOST_BYTES} bytes are read",
            )
    return bytes(read)


@contextmanager
def _answers_read() -> Iterator[None]:
    """Raises ProtocolError for what is no answer of ours."""
    try:
        yield
    except MALFORMED as error:
        raise ProtocolError(
            f"the server's answer lacks what it should hold: {fault_of(error)}"
        ) from error


def _objects(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = answer.get(name)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ProtocolError(f"the server's answer has no list {name!r} of objects")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"a time of {text} s")
    return number


def _path(session_id: str) -> str:
    return f"{SESSIONS}/{quote(session_id, safe='')}"


def _told(status: int, body: bytes, url: str) -> Exception:
    try:
        detail = parse_json(body)["error"]
        code, message = str(detail["code"]), str(detail["message"])
    except MALFORMED:
        return ProtocolError(
            f"status {status}, which is no answer of this server", where=mask_credentials(url)
        )
    return error_from_detail(ErrorDetail(type="", code=code, message=message))
