"""The clients of `soak`: viewers who come, ask, change their minds, are cut off and come back."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import httpx
import websockets

from edge_vlm.errors import ConfigError, EdgeVlmError, NoFrameYet, QuestionCancelled
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.protocol.typed import Settings

QUESTIONS = ("What is there now?", "Is there a dog now?", "What is on the left?")
CHANGES: tuple[Settings, ...] = (
    {"keep_ratio": 0.2},
    {"keep_ratio": 0.5},
    {"policy": "random"},
    {"policy": "difference"},
    {"policy": "stream"},
    {"attention": "exact"},
    {"attention": "frame"},
    {"history_turns": 2},
    {"vision_tokens_per_s": 40.0},
    {"vision_tokens_per_s": 0.0},
    {"instructions": "Answer in one word."},
    {"temperature": 1.0},
)
DECK = (
    *("ask",) * 8,
    *("change",) * 3,
    *("watch",) * 2,
    *("unwatch",) * 2,
    *("cut", "cancel", "wrong"),
)
ENDS = ("close", "abandon", "hand_over")
RESET_S = 0.5
PATIENCE_S = 600.0
"""With a server that gets little of a busy machine."""


class Relay:
    """A TCP relay in front of the server, to reset connections; nobody gets through while it is
    `shut`."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_shut = False

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_shut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        self._writers.discard(sink)
        sink.close()


class Receiver:
    """A webhook receiver on a thread of its own; counts each event's `id`."""

    def __init__(self) -> None:
        self.ids: Counter[str] = Counter()
        taken = self._take

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                taken(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/alerts"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _take(self, body: dict[str, Any]) -> None:
        self.ids[body["id"]] += 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Seen:
    """What all clients counted."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        """Codes of errors that nothing the clients did explains."""
        self.ttft_s: list[tuple[float, float]] = []
        """Seconds since the begin, and the time to the first token, of the steady viewer."""
        self.alert_ids: set[str] = set()
        """Of begins and ends that a viewer was told of: they must reach the receiver."""
        self.frames = Counter[str]()
        self.waiting: dict[str, tuple[int, int]] = {}
        """By session: frames and questions that waited in the last second."""

    def listener(self, session_id: str) -> Callable[[protocol.ServerEvent], None]:
        def take(event: protocol.ServerEvent) -> None:
            if isinstance(event, (AlertTriggered, AlertCleared)):
                kind = protocol.tag_of(type(event))
                self.alert_ids.add(f"{session_id}/{event.alert_id}/{event.episode}/{kind}")
            elif isinstance(event, protocol.SessionStats):
                ended = event.frames_processed + sum(event.frames_dropped.values())
                self.waiting[session_id] = (event.frames_received - ended, event.questions_waiting)

        return take


class Load:
    """All that goes on, until `end_s` of the event loop's clock."""

    def __init__(
        self, port: int, jpegs: Sequence[bytes], *, fps: float, action_s: float, seconds: float
    ) -> None:
        """`action_s`: between two things that a restless viewer does besides sending frames."""
        self.seen = Seen()
        self._port, self._jpegs, self._fps, self._action_s = port, jpegs, fps, action_s
        self._address = f"127.0.0.1:{port}"
        self._begin_s = time.monotonic()
        self._end_s = self._begin_s + seconds
        self._life_s = min(60.0, max(seconds / 4, 4.0))

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._end_s

    async def run(self, restless: int, cameras: Sequence[str]) -> None:
        tasks = [self._steadily(), self._requests(), self._subscriber(cameras), self._deaf(cameras)]
        tasks += [self._restless(random.Random(number)) for number in range(restless)]
        await asyncio.gather(*tasks)

    # ---- viewers with a camera of their own --------------------------------------------------

    async def _steadily(self) -> None:
        while self.goes_on:  # but for an error that is counted, once
            await self._guarded(self._steady)

    async def _steady(self) -> None:
        """Stays for the whole time and asks once a second: its times are judged."""
        async with await Client.connect(self._address, {"drop_duplicates": False}) as client:
            client.on_event = self.seen.listener(client.created.session_id)
            sending = await self._start_frames(client, self._end_s)
            try:
                while self.goes_on:
                    answer = await client.ask(QUESTIONS[0])
                    self.seen.done["steady_answers"] += 1
                    if answer.ttft_s is not None:
                        at = time.monotonic() - self._begin_s
                        self.seen.ttft_s.append((at, answer.ttft_s))
                    await asyncio.sleep(min(1.0, self._action_s))
            finally:
                sent = await sending
            await self._account(client, sent)

    async def _start_frames(self, client: Client, end_s: float) -> asyncio.Task[int]:
        """Returns when there is one to ask about."""
        sent = 0
        while client.frames.processed == 0:  # on a busy machine a live one may be too old
            sent = await client.send_frame(self._jpegs[-1])
            await client.wait_processed()
        return asyncio.create_task(self._send_frames(client, end_s, sent))

    async def _send_frames(self, client: Client, end_s: float, sent: int) -> int:
        """Returns how many there have been, `sent` among them."""
        begin_s, first = time.monotonic(), sent
        while time.monotonic() < end_s:
            await client.send_frame(self._jpegs[sent % len(self._jpegs)])
            sent += 1
            due_s = begin_s + (sent - first) / self._fps
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        return sent

    async def _account(self, client: Client, sent: int) -> None:
        """Every frame has one outcome."""
        await client.wait_processed()
        outcomes = client.frames.processed + client.frames.dropped.total()
        self.seen.frames.update(sent=sent, outcomes=outcomes, wrong=int(outcomes != sent))
        self.seen.done["reconnects"] += client.reconnects

    async def _restless(self, chance: random.Random) -> None:
        number = 0
        async with Relay(self._port) as relay:
            while self.goes_on:
                relay.is_shut = False
                await self._guarded(self._session, chance, relay, ENDS[number % len(ENDS)])
                number += 1

    async def _session(self, chance: random.Random, relay: Relay, end: str) -> None:
        settings: Settings = {
            "delivery": "live" if chance.random() < 0.5 else "wait",
            "drop_duplicates": chance.random() < 0.3,
            "fps_cap": 100.0,
        }
        client = await Client.connect(relay.address, settings, reconnect=end == "close")
        client.on_event = self.seen.listener(client.created.session_id)
        self.seen.done["sessions"] += 1
        end_s = min(self._end_s, time.monotonic() + self._life_s * chance.uniform(0.5, 1.5))
        sending = await self._start_frames(client, end_s)
        try:
            deck: list[str] = []
            watched: list[str] = []
            while not sending.done():
                if not deck:
                    deck = [each for each in DECK if end == "close" or each != "cut"]
                    chance.shuffle(deck)
                await self._act(deck.pop(), client, relay, watched, chance)
                await asyncio.sleep(self._action_s)
            await self._account(client, await sending)
            self.seen.done[end] += 1
            if end == "close":
                return
            relay.cut()
            if end == "hand_over":  # another client goes on with it
                point = client.resume_point
                second = await Client.resume(relay.address, point, reconnect=False)
                second.on_event = self.seen.listener(point.session_id)
                await second.ask(QUESTIONS[0])
                await second.close()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            if end != "close":
                relay.is_shut = True  # nothing says goodbye: the server waits for it, then forgets
            with suppress(EdgeVlmError):
                await client.close()

    async def _act(
        self, what: str, client: Client, relay: Relay, watched: list[str], chance: random.Random
    ) -> None:
        self.seen.done[what] += 1
        if what == "ask":
            answer = await client.ask(chance.choice(QUESTIONS))
            self.seen.done[f"answer {answer.status}"] += 1
        elif what == "change":
            with suppress(ConfigError):  # some do not go together
                await client.update(chance.choice(CHANGES))
        elif what == "watch" and len(watched) < 8:  # one that begins at once
            status = await client.create_alert(
                chance.choice(QUESTIONS[1:]), on_threshold=1e-6, off_threshold=1e-7
            )
            watched.append(status.alert_id)
        elif what == "unwatch" and watched:
            await client.delete_alert(watched.pop(0))
        elif what == "cut":
            relay.cut()
        elif what == "cancel":
            stream = await client.start_answer(QUESTIONS[0])
            await client.cancel()
            with suppress(QuestionCancelled):  # before it began
                await stream.answer()
        elif what == "wrong":
            try:
                await client.update({"keep_ratio": 7.0})
            except ConfigError:
                self.seen.done["refused"] += 1

    # ---- everybody else ----------------------------------------------------------------------

    async def _subscriber(self, cameras: Sequence[str]) -> None:
        """Looks at one camera after the other: asks, watches, goes."""
        number = 0
        while self.goes_on:
            name = cameras[number % len(cameras)]
            number += 1
            await self._guarded(self._look, name)

    async def _look(self, name: str) -> None:
        async with await Client.subscribe(self._address, name) as client:
            client.on_event = self.seen.listener(client.created.session_id)
            self.seen.done["subscriptions"] += 1
            try:
                await client.ask(QUESTIONS[1])
            except NoFrameYet:  # the camera has just begun
                self.seen.done["too_early"] += 1
                await asyncio.sleep(self._action_s)
                return
            alert = await client.create_alert(QUESTIONS[2], on_threshold=1e-6, off_threshold=1e-7)
            await asyncio.sleep(self._action_s * 4)
            await client.ask(QUESTIONS[2])
            await client.delete_alert(alert.alert_id)

    async def _deaf(self, cameras: Sequence[str]) -> None:
        """Wants pictures, does not read them, and is gone without a word."""
        number = 0
        while self.goes_on:
            await self._guarded(self._look_away, cameras[number % len(cameras)])
            number += 1

    async def _look_away(self, name: str) -> None:
        url = f"ws://{self._address}/v1/realtime?stream={name}&subscribe_pictures=true"
        line = await websockets.connect(url, max_queue=1, open_timeout=PATIENCE_S)
        self.seen.done["deaf_subscriptions"] += 1
        await asyncio.sleep(self._action_s * 10)
        line.transport.abort()
        await line.wait_closed()

    async def _requests(self) -> None:
        """HTTP requests, each on a connection of its own."""
        picture = base64.b64encode(self._jpegs[0]).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
            {"type": "text", "text": QUESTIONS[0]},
        ]
        body = {"model": "demo", "messages": [{"role": "user", "content": parts}]}
        number = 0
        while self.goes_on:
            number += 1
            stream = {"stream": True} if number % 2 else {}
            await self._guarded(self._request, body | stream)
            await asyncio.sleep(self._action_s * 2)

    async def _request(self, body: dict[str, Any]) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as http:
            replies = [
                await http.post(f"http://{self._address}/v1/chat/completions", json=body),
                await http.get(f"http://{self._address}/v1/streams"),
            ]
        for reply in replies:
            if reply.status_code != 200:
                self.seen.errors[f"HTTP {reply.status_code}"] += 1
        self.seen.done["http_requests"] += len(replies)

    async def _guarded(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Counts what it should not have met, and goes on."""
        try:
            await work(*arguments)
        except EdgeVlmError as error:
            self.seen.errors[f"{error.code}: {str(error)[:100]}"] += 1
            await asyncio.sleep(RESET_S)
        except (OSError, httpx.HTTPError, websockets.WebSocketException) as error:
            self.seen.errors[repr(error)[:100]] += 1
            await asyncio.sleep(RESET_S)
