"""Streams, alerts and answers of a server in Home Assistant, and questions from there, over MQTT.

A thread of its own with an event loop, as the alert outputs have. What it publishes are states:
each topic has one newest value, retained, so a broker that was away is brought up to date and never
flooded. (Every begin and end of an alert, in order, is what the alert outputs are for.)
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from edge_vlm.errors import EdgeVlmError, InternalError, TooManyQuestions
from edge_vlm.errors.requests import RequestError
from edge_vlm.waiting import cancel
from edge_vlm_runtime import protocol
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.mqtt_connection import (
    Connection,
    Dialler,
    Message,
    MqttAddress,
    MqttError,
    Will,
)
from edge_vlm_runtime.alert_sinks.picture_limit import PictureLimit
from edge_vlm_runtime.home_assistant.entities import (
    DEFAULT_BASE,
    DEFAULT_PREFIX,
    OFFLINE,
    ONLINE,
    PICTURE,
    Place,
)
from edge_vlm_runtime.home_assistant.states import (
    INTERESTING,
    HomeStates,
    WatchedAlert,
    answer_fields,
    now,
    to_json,
)
from edge_vlm_runtime.sources.container import mask_credentials

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
GRACE_S = 5.0
"""At the end, for what is still to be published."""
MAX_QUESTIONS = 8
"""Under way at once, over MQTT."""
MAX_REPLIES = 64
"""That wait to be sent, refusals included."""
MAX_QUESTION_BYTES = 16_000
MAX_ID = 200


Ask = Callable[[str, str], "Future[protocol.ResponseDone]"]
"""Asks a stream, by name, a question. The future raises what the question is refused with."""


class HomeAssistant:
    """Use as a context manager, or call `start` and `close`. Everything may be called from any
    thread and returns at once."""

    def __init__(
        self,
        url: str,
        node: str,
        ask: Ask,
        *,
        prefix: str = DEFAULT_PREFIX,
        model: str = "",
        evidence: EvidenceSize = EvidenceSize.SMALL,
        first_back_off_s: float = FIRST_BACK_OFF_S,
    ) -> None:
        """`mqtt://HOST`, `mqtts://`; a topic behind it takes the place of edge-vlm's own. `node`:
        this server's name on the broker; `model`: that of the bundle. Raises ConfigError."""
        address = MqttAddress.of(url, DEFAULT_BASE)
        self.name = f"Home Assistant at {mask_credentials(url)}"
        self._place = Place(node, address.topic, prefix.strip("/"))
        self._dialler = Dialler(address, Will(self._place.status, OFFLINE))
        self._ask = ask
        self._model = model
        self._pictures = PictureLimit(self.name, evidence)
        self._first_back_off_s = first_back_off_s
        self._run_id = secrets.token_hex(8)
        self._rivals: set[bytes] = set()
        """Other processes that go by the same name."""
        self._client: Connection | None = None
        """None while there is no connection."""
        self._questions: set[asyncio.Task[None]] = set()
        self._is_flooded = False
        """It was said that there are too many to answer."""
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._news = asyncio.Event()
        self._home = HomeStates(
            self._place,
            model,
            with_pictures=evidence is not EvidenceSize.NONE,
            on_news=self._news.set,
        )
        self._is_declared = asyncio.Event()
        self._stop: asyncio.Future[None]
        self._thread = threading.Thread(target=self._run, name="edge-vlm-home", daemon=True)

    # ---- called from other threads -----------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._started.result()

    def declare(self, streams: Mapping[str, Iterable[WatchedAlert]]) -> None:
        """Which streams there are and what is watched for in each; others are removed."""
        plan = {name: tuple(alerts) for name, alerts in streams.items()}
        self._call(self._declare, plan)

    def begin(self, stream: str) -> None:
        """It has a new session: nothing of the one before is left."""
        self._call(self._home.begin, stream)

    def note(self, stream: str, *, is_live: bool) -> None:
        """Whether its camera gives pictures."""
        self._call(self._home.note, stream, is_live)

    def put(self, stream: str, event: protocol.ServerEvent) -> None:
        """What a stream's session says. What is of no interest costs nothing."""
        if isinstance(event, INTERESTING):
            self._call(self._home.take, stream, event)

    def close(self) -> None:
        """Says that the server is gone. Twice does no harm."""
        if self._thread.is_alive():
            self._call(self._end)
            self._thread.join()

    def __enter__(self) -> HomeAssistant:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._started.result().call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop has ended: there is nobody to tell any more
            return

    def _declare(self, plan: Mapping[str, tuple[WatchedAlert, ...]]) -> None:
        self._home.declare(plan)
        self._is_declared.set()

    # ---- the broker, on a thread of its own --------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if self._started.done():
                log.exception("a bug ended the connection to %s", self.name)
            else:
                self._started.set_exception(error)

    def _end(self) -> None:
        if not self._stop.done():
            self._stop.set_result(None)
            self._news.set()

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()
        self._started.set_result(loop)
        task = asyncio.create_task(self._stay_connected())
        try:
            await asyncio.wait([self._stop, task], return_when=asyncio.FIRST_COMPLETED)
            if self._client is not None:
                await asyncio.wait([task], timeout=GRACE_S)
            if task.done():
                task.result()
        finally:
            await cancel(task, *self._questions)

    async def _stay_connected(self) -> None:
        await self._is_declared.wait()  # or what is not known yet would be taken away
        back_off_s, is_away = self._first_back_off_s, False
        made: list[Connection] = []
        while not self._stop.done():
            try:
                self._client = await self._dialler.connect(made.append)
                if is_away:
                    log.warning("%s is back", self.name)
                back_off_s, is_away = self._first_back_off_s, False
                await self._talk(self._client)
                return
            except (MqttError, OSError) as error:
                if not is_away:
                    trouble = self._dialler.trouble(error)
                    log.warning("%s: %s; what is new waits for it", self.name, trouble)
                is_away = True
            finally:
                self._client = None
                while made:
                    await made.pop().end()
            await asyncio.wait([self._stop], timeout=back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)

    async def _talk(self, client: Connection) -> None:
        """Until the end, or MqttError."""
        place = self._place
        listening = asyncio.create_task(self._listen(client))
        try:
            for topic in (place.birth, place.questions, place.configs, place.owner):
                await client.subscribe(topic, 1)
            await client.deliver(place.owner, self._run_id.encode(), retain=True)
            self._home.announce()
            await self._publish_outbox(client)
            await client.deliver(place.status, ONLINE.encode(), retain=True)
            publishing = asyncio.create_task(self._publish(client))
            try:
                await asyncio.wait([publishing, listening], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel(publishing)
            for task in (listening, publishing):
                if task.done() and not task.cancelled():
                    task.result()
            await client.deliver(place.status, OFFLINE.encode(), retain=True)
        finally:
            await cancel(listening)

    async def _publish(self, client: Connection) -> None:
        """Returns when all is published and it is to end."""
        while True:
            self._news.clear()
            await self._publish_outbox(client)
            if self._stop.done() and not self._questions:
                return
            await self._news.wait()

    async def _publish_outbox(self, client: Connection) -> None:
        outbox = self._home.outbox
        while outbox:
            topic, value = next(iter(outbox.items()))
            payload, room = value, client.room(topic)
            if is_picture := bool(value) and topic.endswith(PICTURE):
                self._pictures.announced(room)
                payload = await self._pictures.fit(value) or b""
            if room is not None and len(payload) > room:
                log.warning("%s takes %d bytes at most: %s is left out", self.name, room, topic)
            else:
                await client.deliver(topic, payload, retain=True)
            if is_picture:
                self._pictures.delivered(value, payload or None)
            if outbox.get(topic) is value:  # nothing newer meanwhile
                del outbox[topic]

    async def _listen(self, client: Connection) -> None:
        place = self._place
        async for message in client.messages:
            topic, payload = message.topic.value, _payload(message)
            if topic == place.birth:
                if payload == ONLINE.encode() and not message.retain:
                    self._home.announce()
            elif topic == place.owner:
                if not message.retain:  # else of an earlier run
                    await self._note_owner(client, payload)
            elif topic.startswith(f"{place.prefix}/"):
                if payload and topic not in self._home.configs:  # of an earlier run
                    self._home.remove_stale(topic, payload)
            elif not message.retain:  # a question that lies there was meant for another time
                self._take_question(client, topic, payload)

    async def _note_owner(self, client: Connection, run_id: bytes) -> None:
        if run_id == self._run_id.encode() or run_id in self._rivals or len(self._rivals) > 8:
            return
        self._rivals.add(run_id)
        log.error(
            "%s: two servers are called %s there and take away each other's entities; give one "
            "another name with --node",
            self.name,
            self._place.node,
        )
        await client.deliver(self._place.owner, self._run_id.encode(), retain=True)  # to tell it

    # ---- questions ---------------------------------------------------------------------------

    def _take_question(self, client: Connection, topic: str, payload: bytes) -> None:
        if len(self._questions) >= MAX_REPLIES:  # a flood: not even worth a refusal each
            if not self._is_flooded:
                log.warning("%s: questions come faster than they can be refused", self.name)
            self._is_flooded = True
            return
        task = asyncio.create_task(self._reply(client, topic.rpartition("/")[0], payload))
        self._questions.add(task)
        task.add_done_callback(self._question_ended)

    def _question_ended(self, task: asyncio.Task[None]) -> None:
        self._questions.discard(task)
        self._news.set()

    async def _reply(self, client: Connection, topic: str, payload: bytes) -> None:
        """Asks, and tells whoever asked."""
        fields: dict[str, Any] = {}
        stream = self._home.topics.get(topic)
        try:
            fields = _question(payload)
            if stream is None:
                known = ", ".join(self._home.topics)
                raise RequestError("there is no such stream", remedy=f"there are {known or 'none'}")
            if len(self._questions) > MAX_QUESTIONS:
                raise TooManyQuestions(f"{MAX_QUESTIONS} questions are under way here already")
            asked = self._ask(stream, fields["question"])
            fields |= answer_fields(await asyncio.wrap_future(asked))
        except EdgeVlmError as error:
            fields |= _error_fields(error)
            if stream is not None:
                shown = {name: value for name, value in fields.items() if name != "id"}
                self._home.answer(stream, {"question": "", **shown})
        except Exception:
            log.exception("a question over MQTT failed")
            fields |= _error_fields(InternalError("the question failed", remedy="see the log"))
        try:
            await client.deliver(f"{topic}/reply", to_json({**fields, "at": now()}))
        except MqttError as error:
            log.warning("%s: an answer was not delivered: %s", self.name, error)


def _question(payload: bytes) -> dict[str, Any]:
    """`question` and perhaps `id`. Raises RequestError."""
    if len(payload) > MAX_QUESTION_BYTES:
        raise RequestError(f"a question of {len(payload)} bytes, {MAX_QUESTION_BYTES} at most")
    try:
        text = payload.decode()
        fields = json.loads(text) if text.lstrip().startswith("{") else {"question": text}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the question is neither text nor JSON: {error}") from error
    for name, value in fields.items():
        if name not in ("question", "id"):
            raise RequestError(f"unknown field {name[:40]!r}", remedy="question and id alone")
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a text", param=name)
    if not fields.get("question", "").strip():
        raise RequestError("the question is empty", param="question")
    if len(fields.get("id", "")) > MAX_ID:
        raise RequestError(f"an id has {MAX_ID} characters at most", param="id")
    return dict(fields)


def _error_fields(error: EdgeVlmError) -> dict[str, Any]:
    return {"answer": None, "error": f"{error.code}: {error}"}


def _payload(message: Message) -> bytes:
    return message.payload if isinstance(message.payload, bytes) else b""
