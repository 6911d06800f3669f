"""Live sessions over HTTP, for those who have no session of their own: agents, dashboards, scripts.

GET  /v1/edge_vlm/sessions                       which there are
GET  /v1/edge_vlm/sessions/ID                    one of them
GET  /v1/edge_vlm/sessions/ID/snapshot           its newest picture, image/jpeg
GET  /v1/edge_vlm/sessions/ID/alerts             where its alerts stand
POST /v1/edge_vlm/sessions/ID/alerts             watches for something more: fields of alert.create
GET  /v1/edge_vlm/sessions/ID/events?after=&wait_s=    begins and ends of alerts, the next one too

Questions go to /v1/chat/completions with `edge_vlm: {session: ID}`. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edge_vlm.errors import NoFrameYet, SessionGone, UnknownStream
from edge_vlm.errors.requests import MethodNotAllowed, NoSuchPath, RequestError
from edge_vlm.pixels.frames import shrink_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.base import json_bytes
from edge_vlm_runtime.server.live_view import LiveView
from edge_vlm_runtime.server.sessions import ClientSession, SessionRegistry

PREFIX = "/v1/edge_vlm"
MAX_BODY_BYTES = 1 << 16
LONGEST_WAIT_S = 60.0
REPLY_TIMEOUT_S = 30.0
JPEG = b"\xff\xd8\xff"

Reply = TypeVar("Reply", bound=protocol.ServerEvent)


@dataclass(frozen=True)
class Answer:
    body: bytes
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class LiveApi:
    """One for each server."""

    def __init__(self, table: SessionRegistry) -> None:
        self._table = table

    async def answer(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> Answer:
        """`path`: behind PREFIX. Raises RequestError and its leaves, SessionError and its."""
        room, _, rest = path.strip("/").partition("/")
        name, _, what = rest.partition("/")
        if room != "sessions" or (what and not name):
            raise _no_such_path(path)
        if what == "alerts" and method == "POST":
            return _json(await self._create_alert(self._session(name), body))
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{method[:20]} is not for this path", remedy="use GET")
        if not name:
            sessions = [self._about(session) for session in self._table.all_sessions]
            return _json({"object": "list", "data": sessions})
        session = self._session(name)
        if not what:
            return _json(self._about(session))
        if what == "snapshot":
            return await self._snapshot(session)
        if what == "alerts":
            return _json({"alerts": await self._list_alerts(session)})
        if what == "events":
            return _json(await self._events(session, query))
        raise _no_such_path(path)

    def _session(self, name: str) -> ClientSession:
        try:
            return self._table.require_session(name)
        except UnknownStream:
            raise
        except SessionGone as error:
            raise SessionGone(
                error.what, remedy=f"GET {PREFIX}/sessions lists those there are"
            ) from error

    def _about(self, session: ClientSession) -> dict[str, Any]:
        found = {
            "id": session.session_id,
            "object": "edge_vlm.session",
            "connected": session.viewer is not None or session.camera is not None,
            "frames_accepted": session.view.num_accepted,
            "newest_frame": newest_frame(session.view, self._table.clock_ns()),
            "newest_event": session.view.num_happened,
        }
        return found if session.camera is None else {**found, "stream": session.camera}

    async def _snapshot(self, session: ClientSession) -> Answer:
        newest = session.view.newest
        if newest is None:
            raise NoFrameYet("the model was shown no picture yet", remedy="send a frame first")
        data = newest.frame.data
        if data[:3] != JPEG:
            data = await asyncio.to_thread(shrink_jpeg, data, sys.maxsize)
        age_s = (self._table.clock_ns() - newest.frame.received_ns) * 1e-9
        facts = {
            "X-Edge-Vlm-Frame": f"{newest.frame.seq}",
            "X-Edge-Vlm-Time-S": f"{newest.time_s:.3f}",
            "X-Edge-Vlm-Age-S": f"{age_s:.3f}",
        }
        return Answer(data, "image/jpeg", {**facts, "Cache-Control": "no-store"})

    # ---- alerts ------------------------------------------------------------------------------

    async def _create_alert(self, session: ClientSession, body: bytes) -> Any:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        if not isinstance(fields, dict) or {"type", "event_id"} & fields.keys():
            raise RequestError("the body must be an object with the fields of alert.create")
        tag = protocol.tag_of(messages.AlertCreate)
        message = protocol.decode_client_message(json.dumps({**fields, "type": tag}))
        assert isinstance(message, messages.AlertCreate)
        return (await session.request(message, messages.AlertCreated)).alert

    async def _list_alerts(self, session: ClientSession) -> Any:
        return (await session.request(messages.AlertList(), messages.AlertListed)).alerts

    async def _events(self, session: ClientSession, query: Mapping[str, str]) -> dict[str, Any]:
        after = int(_number(query, "after", 0, 1 << 53))
        wait_s = _number(query, "wait_s", 0, LONGEST_WAIT_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while not (found := session.view.happened(after)) and session.ending is None:
            left_s = deadline - loop.time()
            if left_s <= 0:
                break
            await session.view.wait(left_s)
        now_ns = self._table.clock_ns()
        return {
            "events": [each.fields(now_ns) for each in found],
            "newest_event": session.view.num_happened,
            "has_ended": session.ending is not None,
        }


def newest_frame(view: LiveView, now_ns: int) -> dict[str, Any] | None:
    """Of the frames that the model was shown."""
    newest = view.newest
    if newest is None:
        return None
    return {
        "frame_sequence": newest.frame.seq,
        "time_s": newest.time_s,
        "age_s": (now_ns - newest.frame.received_ns) * 1e-9,
    }


def _number(query: Mapping[str, str], name: str, least: float, most: float) -> float:
    text = query.get(name, "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most:
        raise RequestError(f"{name} must be {least:g}..{most:g}, got {text[:40]!r}", param=name)
    return value


def _json(value: Any) -> Answer:
    return Answer(json_bytes(value))


def _no_such_path(path: str) -> NoSuchPath:
    return NoSuchPath(
        f"nothing is served at {PREFIX}/{path[:60]}", remedy=f"there is {PREFIX}/sessions"
    )
