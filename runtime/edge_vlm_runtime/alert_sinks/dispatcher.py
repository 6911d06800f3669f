"""Alerts to the world outside: every begin and end goes to each receiver until it has it.

A thread of its own with an event loop: neither the engines nor the server's sockets ever wait for a
receiver, and one receiver never waits for another. Each gets its events in order. What it does not
take is sent again, with pauses that grow, until it is taken, refused for good, or pushed out of a
full queue by newer ones. An event may arrive twice (a receiver that dies between taking it and
saying so); its `id` stays the same.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Protocol

from edge_vlm.errors import DeliveryError, DeliveryRefused
from edge_vlm.waiting import cancel, within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.alert_sinks.queue import (
    FIRST_BACK_OFF_S,
    LONGEST_BACK_OFF_S,
    DeliveryQueue,
    QueuedAlert,
)
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.base import UNSET

log = logging.getLogger(__name__)

ATTEMPT_TIMEOUT_S = 10.0
"""A receiver that says nothing for this long is tried again."""
GRACE_S = 5.0
"""At the end, for what is still on its way."""

AlertEvent = messages.AlertTriggered | messages.AlertCleared


class Sink(Protocol):
    """One receiver. All of it is called on the dispatcher's loop."""

    name: str
    """What is logged; holds no credentials."""
    key: str
    """What its queue is known by: `queue.receiver_key`."""
    trouble: str
    """Why an attempt took too long."""

    async def send(self, delivery: QueuedAlert) -> None:
        """Returns when the receiver has it. Raises DeliveryRefused if it never will, DeliveryError
        for everything that may pass; then, or when cancelled, it is called again."""

    async def close(self) -> None: ...


class AlertDispatcher:
    """Use as a context manager, or call `start` before and `close` after everything else."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        queue: DeliveryQueue | None = None,
        *,
        with_pictures: bool = True,
        first_back_off_s: float = FIRST_BACK_OFF_S,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Without pictures, none is kept in the queue either.

        Raises ConfigError if the queue's file cannot be read.
        """
        self._sinks = list(sinks)
        self._queue = queue or DeliveryQueue()
        self._queue.load({sink.key: sink.name for sink in self._sinks})
        self._with_pictures = with_pictures
        self._first_back_off_s = first_back_off_s
        self._attempt_timeout_s = attempt_timeout_s
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._is_closed = False
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._news = [asyncio.Event() for _ in self._sinks]
        """One for each sink: its queue has something, or it ends."""
        self._stop: asyncio.Future[float]
        self._thread = threading.Thread(target=self._run, name="edge-vlm-alert-sinks", daemon=True)
        self.delivered = 0
        """Events taken by a receiver."""
        self.lost = 0
        """Events that a receiver refused, or that a full queue had no room for."""
        self.undelivered: dict[str, int] = {}
        """By receiver, when closed: events that it has not taken."""
        self._why: dict[str, str] = {}
        """By receiver: what was wrong when it last did not take one."""

    # ---- called from other threads -----------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._started.result()

    def put(self, session_id: str, event: protocol.ServerEvent) -> None:
        """Hands an event over if it is about an alert's begin or end. Never waits."""
        if not isinstance(event, AlertEvent):
            return
        with self._lock:
            if self._is_closed:
                self._lose(len(self._sinks), "the outputs are closed")
                return
            body, jpeg = _body(session_id, event, self._wall_clock())
            jpeg = jpeg if self._with_pictures else None
            for sink in self._sinks:
                if lost := self._queue.put(sink.key, body, jpeg):
                    self._lose(lost, f"{sink.name} has not taken the events before it")
            if self._started.done():
                self._started.result().call_soon_threadsafe(self._wake)

    def close(self, grace_s: float | None = None) -> None:
        """Waits until everything has arrived, at most `grace_s` (GRACE_S). Twice does no harm."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                grace_s = GRACE_S if grace_s is None else grace_s
                self._started.result().call_soon_threadsafe(_resolve, self._stop, grace_s)
        self._thread.join()

    def raise_undelivered(self) -> None:
        """After `close`: raises DeliveryError if a receiver did not take everything."""
        if not self.undelivered:
            return
        numbers = ", ".join(
            f"{count} for {name}" + (f" ({self._why[name]})" if name in self._why else "")
            for name, count in self.undelivered.items()
        )
        remedy = "keep them in a file with --alert-queue FILE"
        if self._queue.path is not None:
            remedy = f"{self._queue.path} did not take all of them either: look at its disk"
        if self._queue.is_saved:
            remedy = f"they are kept in {self._queue.path} for the next run that names it"
        raise DeliveryError(f"alert events did not arrive: {numbers}", remedy=remedy)

    def __enter__(self) -> AlertDispatcher:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        log.warning("%d alert event(s) lost: %s", count, why)

    # ---- on a thread of its own --------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if self._started.done():
                log.exception("a bug ended every alert output")
            else:
                self._started.set_exception(error)  # `start` waits for it

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self._stop = loop.create_future()
        tasks = [
            asyncio.create_task(self._deliver(sink, news))
            for sink, news in zip(self._sinks, self._news, strict=True)
        ]
        self._started.set_result(loop)
        try:
            grace_s = await self._stop
            self._wake()
            if tasks:
                await asyncio.wait(tasks, timeout=grace_s)
            await cancel(*tasks)
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    log.error("an alert output ended with %r", ended)
            for sink in self._sinks:
                if count := self._queue.count(sink.key):
                    self.undelivered[sink.name] = self.undelivered.get(sink.name, 0) + count
        finally:
            with self._lock:  # nobody may call a loop that is no more
                self._is_closed = True
            self._queue.close()

    def _wake(self) -> None:
        for news in self._news:
            news.set()

    async def _deliver(self, sink: Sink, news: asyncio.Event) -> None:
        """Until the queue is empty at the end, or cancelled."""
        back_off_s, is_away = self._first_back_off_s, False
        try:
            while True:
                delivery = self._queue.oldest(sink.key)
                if delivery is None:
                    if self._stop.done():
                        return
                    news.clear()
                    await news.wait()
                    continue
                failure = await self._attempt(sink, delivery)
                if failure is None:
                    self._why.pop(sink.name, None)
                    self._queue.remove(sink.key, delivery.number)
                    if is_away:
                        log.warning("%s is back", sink.name)
                    back_off_s, is_away = self._first_back_off_s, False
                    continue
                self._why[sink.name] = str(failure)
                if not is_away:
                    bug = None if isinstance(failure, DeliveryError) else failure
                    text = "%s does not take alerts, they wait for it: %s"
                    log.warning(text, sink.name, str(failure), exc_info=bug)
                    is_away = True
                await asyncio.sleep(back_off_s)
                back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
        finally:
            await sink.close()

    async def _attempt(self, sink: Sink, delivery: QueuedAlert) -> Exception | None:
        """None if the receiver has it or never will, otherwise why it has to be sent again."""
        try:
            await within(self._attempt_timeout_s, sink.send(delivery))
        except DeliveryRefused as error:
            with self._lock:
                self._lose(1, f"{sink.name} refused it: {error}")
        except asyncio.TimeoutError:
            return DeliveryError(sink.trouble)
        except Exception as error:  # noqa: BLE001  reported by the caller, a bug of ours included
            return error
        else:
            self.delivered += 1
        return None


def _body(session_id: str, event: AlertEvent, wall_s: float) -> tuple[str, bytes | None]:
    """What a receiver gets, as JSON without the picture, and the picture."""
    fields: dict[str, Any] = {
        name: getattr(event, name)
        for name in event.__struct_fields__
        if name not in ("sequence", "evidence") and getattr(event, name) is not UNSET
    }
    jpeg = None
    if isinstance(event, messages.AlertTriggered) and event.evidence is not None:
        jpeg = event.evidence.jpeg
        fields["evidence"] = {
            "frame_sequence": event.evidence.frame_sequence,
            "time_s": event.evidence.time_s,
            "exact": event.evidence.exact,
        }
    kind = protocol.tag_of(type(event))
    head = {
        "id": f"{session_id}/{event.alert_id}/{event.episode}/{kind}",
        "type": kind,
        "at": datetime.fromtimestamp(wall_s, timezone.utc).isoformat(timespec="milliseconds"),
        "session_id": session_id,
    }
    return json.dumps(head | fields), jpeg


def _resolve(future: asyncio.Future[float], value: float) -> None:
    if not future.done():
        future.set_result(value)
