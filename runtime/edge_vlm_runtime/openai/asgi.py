"""Everything under /v1 that is plain HTTP, as one ASGI application: routes, bodies, replies.

A client that leaves ends its work. Whatever goes wrong is told in OpenAI's envelope.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing, suppress
from typing import Any

from edge_vlm.errors import (
    EdgeVlmError,
    HostNotAllowed,
    MessageTooLarge,
    RequestTimeout,
    ServerBusy,
)
from edge_vlm.errors.requests import MethodNotAllowed, ModelNotFound, NoSuchPath
from edge_vlm.waiting import cancel
from edge_vlm_runtime import protocol
from edge_vlm_runtime.openai.chat_request import ChatRequest, read_chat_request
from edge_vlm_runtime.openai.completion import DONE, Reply, Timing, sse
from edge_vlm_runtime.openai.envelope import envelope, headers_of, status_of
from edge_vlm_runtime.openai.live import LiveQuestions, LiveSessions
from edge_vlm_runtime.openai.one_shot import OneShots
from edge_vlm_runtime.openai.request_queue import HeldBytes, RequestQueue

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PREFIX = "/v1"
MAX_SHOWN = 100
LEFT = 499
"""Status of a reply that nobody reads any more; of no RFC, but of others' servers."""
PATIENCE_S = 30.0
"""For a client that sends, or reads, nothing."""
LEAST_BYTES_PER_S = 16_384.0
"""Of a body, on the average after that time."""


class OpenAiApi:
    """One for each server. Lives on its event loop."""

    def __init__(
        self,
        *,
        one_shots: OneShots,
        live: LiveSessions,
        queue: RequestQueue,
        model_id: str,
        allows_origin: Callable[[str | None, str | None], bool],
        on_reply: Callable[[int], None] = lambda status: None,
    ) -> None:
        """`on_reply` gets the status of each reply."""
        self._one_shots = one_shots
        self._live = LiveQuestions(live, one_shots, queue.limits.max_queued_questions)
        self._queue = queue
        self._model_id = model_id
        self._allows_origin = allows_origin
        self._on_reply = on_reply
        self._created = int(time.time())
        self._work: set[asyncio.Task[Any]] = set()
        self.is_draining = False

    # ---- a server's end ----------------------------------------------------------------------

    async def drain(self, time_left_s: float) -> None:
        """No new requests; those that run get their time, then they are cancelled."""
        self.is_draining = True
        if self._work:
            await asyncio.wait(set(self._work), timeout=time_left_s)
        await cancel(*self._work)

    # ---- routes ------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Sender(send)
        try:
            await self._answer(scope, receive, reply)
        except _NobodyReads:
            reply.status = LEFT
        except Exception as error:
            if not isinstance(error, EdgeVlmError):
                log.exception("a request failed")
            with suppress(_NobodyReads):
                await reply.error(error)
        self._on_reply(reply.status)

    async def _answer(self, scope: Scope, receive: Receive, reply: _Sender) -> None:
        path, method = str(scope["path"]), str(scope["method"])
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        if not self._allows_origin(headers.get("origin"), headers.get("host")):
            raise HostNotAllowed(
                "a page from elsewhere may not ask", remedy="start with --allow-origin ORIGIN"
            )
        if path == f"{PREFIX}/models":
            _require_method(method, "GET", "HEAD")
            await reply.json({"object": "list", "data": [self._model()]})
        elif path.startswith(f"{PREFIX}/models/"):
            _require_method(method, "GET", "HEAD")
            self._require_model(path.removeprefix(f"{PREFIX}/models/"), None)
            await reply.json(self._model())
        elif path == f"{PREFIX}/chat/completions":
            _require_method(method, "POST")
            await self._chat(headers, receive, reply)
        elif path == protocol.PATH:
            raise NoSuchPath("this path is a websocket's", remedy="connect with ws:// or wss://")
        else:
            raise NoSuchPath(
                f"nothing is served at {path[:MAX_SHOWN]}",
                remedy="there are /v1/chat/completions, /v1/models and the websocket "
                f"{protocol.PATH}",
            )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "edge-vlm",
            "max_model_len": self._one_shots.max_model_tokens,
        }

    def _require_model(self, wanted: str, param: str | None) -> None:
        require_model(self._model_id, wanted, param)

    # ---- chat --------------------------------------------------------------------------------

    async def _chat(self, headers: Mapping[str, str], receive: Receive, reply: _Sender) -> None:
        if self.is_draining:
            raise ServerBusy("the server is stopping", remedy="try again later")
        with self._queue.held() as held:
            body = await _read_body(headers, receive, held)
            if body is None:
                reply.status = LEFT
                return
            received_s = asyncio.get_running_loop().time()
            work = asyncio.create_task(self._complete(body, received_s, reply))
            gone = asyncio.create_task(_until_gone(receive))
            self._work.add(work)
            work.add_done_callback(self._work.discard)
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                is_stopped = gone.done() or work.cancelled()
            finally:
                await cancel(work, gone)
            if work.cancelled():
                if not gone.cancelled():
                    reply.status = LEFT
                elif is_stopped:
                    raise ServerBusy("the server is stopping", remedy="try again later")
                return
            work.result()

    async def _complete(self, body: bytes, received_s: float, reply: _Sender) -> None:
        request = await asyncio.to_thread(read_chat_request, body)
        self._require_model(request.model, "model")
        timing = Timing(received_s=received_s)
        if request.session is not None:
            await asyncio.to_thread(self._one_shots.check, request)
            await self._tell(request, self._live.ask(request), timing, reply)
            return
        plan = await asyncio.to_thread(self._one_shots.plan, request)
        async with self._queue.turn():
            await self._tell(request, self._one_shots.run(request, plan), timing, reply)

    async def _tell(
        self,
        request: ChatRequest,
        events: AsyncGenerator[protocol.ServerEvent, None],
        timing: Timing,
        reply: _Sender,
    ) -> None:
        """What a session says, as chunks or as one object. Once chunks have gone out, what goes
        wrong is the last of them."""
        clock = asyncio.get_running_loop().time
        timing.began_s = clock()
        answer = Reply(model=self._model_id, ignored=request.ignored)
        ignored = {"X-Edge-Vlm-Ignored": ", ".join(request.ignored)} if request.ignored else {}
        holds = not request.is_streamed
        has_begun = False
        done: protocol.ResponseDone | None = None
        async with aclosing(events):
            async for event in events:
                if isinstance(event, protocol.MemoryRebased):
                    holds = True  # times in deltas would not be those of the video
                elif isinstance(event, protocol.ResponseCreated) and request.is_streamed:
                    await reply.begin_stream(ignored)
                    await reply.write(sse(answer.chunk({"role": "assistant", "content": ""})))
                elif isinstance(event, protocol.ResponseOutputTextDelta):
                    if timing.first_s is None:
                        timing.first_s = clock()
                    text = event.delta if has_begun else event.delta.lstrip(" ")
                    if text and not holds:
                        await reply.write(sse(answer.chunk({"content": text})))
                        has_begun = True
                elif isinstance(event, protocol.ResponseDone):
                    done = event
        assert done is not None
        timing.ended_s = clock()
        if done.status != "completed":
            raise _failure_of(done)
        if not request.is_streamed:
            await reply.json(answer.whole(done, timing), ignored)
            return
        if holds and done.shown_text:
            await reply.write(sse(answer.chunk({"content": done.shown_text.lstrip(" ")})))
        await reply.write(sse(answer.chunk({}, done.finish_reason)))
        if request.includes_usage:
            await reply.write(sse(answer.last_chunk(done, timing)))
        await reply.end_stream(DONE)


def require_model(served: str, wanted: str, param: str | None = None) -> None:
    """Raises ModelNotFound."""
    if wanted != served:
        raise ModelNotFound(
            f"there is no model {wanted[:MAX_SHOWN]!r}",
            param=param,
            remedy=f"this server has {served!r}; see GET {PREFIX}/models",
        )


def _failure_of(done: protocol.ResponseDone) -> EdgeVlmError:
    if done.status == "cancelled":
        return ServerBusy("the answer was cancelled", remedy="ask again")
    detail = protocol.ErrorDetail(
        type="server_error", code=done.error_code or "E-INTERNAL", message="the answer failed"
    )
    return protocol.error_from_detail(detail)


def _require_method(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise MethodNotAllowed(f"{method[:20]} is not for this path", remedy=f"use {allowed[0]}")


async def _read_body(headers: Mapping[str, str], receive: Receive, held: HeldBytes) -> bytes | None:
    """None when the client left. Raises MessageTooLarge, ServerBusy, before more is read."""
    announced = headers.get("content-length", "")
    if announced.isdecimal():
        held.grow(int(announced) if len(announced) < 19 else 1 << 62)
    body = bytearray()
    clock = asyncio.get_running_loop().time
    began_s = clock()
    while True:
        left_s = began_s + PATIENCE_S + len(body) / LEAST_BYTES_PER_S - clock()
        try:
            message = await asyncio.wait_for(receive(), left_s)
        except asyncio.TimeoutError as error:
            raise RequestTimeout(
                f"{len(body)} bytes in {clock() - began_s:.0f} s, and not the whole request",
                remedy="send it faster",
            ) from error
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > held.num_bytes:
            held.grow(len(body) - held.num_bytes)
        if not message.get("more_body", False):
            return bytes(body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _NobodyReads(Exception):
    """The client takes nothing any more; it may be gone, and its network silent about it."""


class _Sender:
    """One reply. Each step of it raises _NobodyReads."""

    def __init__(self, send: Send) -> None:
        self._send_now = send
        self.status = 0
        self._is_streaming = False

    async def _send(self, message: Message) -> None:
        try:
            await asyncio.wait_for(self._send_now(message), PATIENCE_S)
        except asyncio.TimeoutError as error:
            raise _NobodyReads from error

    async def json(self, value: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        await self._whole(200, value, headers or {})

    async def _whole(self, status: int, value: Any, headers: Mapping[str, str]) -> None:
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        length = {"Content-Length": str(len(body))}
        await self._start(status, {"Content-Type": "application/json", **length, **headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        fields = [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})

    async def begin_stream(self, headers: Mapping[str, str]) -> None:
        self._is_streaming = True
        kind = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        await self._start(200, {**kind, "X-Accel-Buffering": "no", **headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes) -> None:
        self._is_streaming = False
        await self._send({"type": "http.response.body", "body": data})

    async def error(self, error: BaseException) -> None:
        if self._is_streaming:
            await self.write(sse(envelope(error)))
            await self.end_stream(b"")
            return
        if self.status:
            return
        status, headers = status_of(error), headers_of(error)
        if isinstance(error, (MessageTooLarge, RequestTimeout, ServerBusy)):
            headers["Connection"] = "close"  # the rest of the body is not read
        await self._whole(status, envelope(error), headers)
