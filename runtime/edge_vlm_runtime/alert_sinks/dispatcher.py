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
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Protocol

from edge_vlm.errors import DeliveryError, DeliveryRefused
from edge_vlm_runtime import protocol
from edge_vlm_runtime.alert_sinks.queue import DeliveryQueue, QueuedAlert
from edge_vlm_runtime.protocol import alerts as messages

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0
ATTEMPT_TIMEOUT_S = 10.0
"""A receiver that says nothing for this long is tried again."""
GRACE_S = 5.0
"""At the end, for what is still on its way."""
MAX_INBOX = 1000
"""Events between two threads, should the disk be slow."""

AlertEvent = messages.AlertTriggered | messages.AlertCleared


class Sink(Protocol):
    """One receiver."""

    name: str
    """What is logged and what its queue is known by; holds no credentials."""
    trouble: str
    """Why an attempt took too long."""

    async def open(self) -> None:
        """Called once, on the loop that `send` runs on. Does not wait for the receiver."""

    async def send(self, delivery: QueuedAlert) -> None:
        """Returns when the receiver has it. Raises DeliveryRefused if it never will, DeliveryError
        for everything that may pass; then, or when cancelled, it is called again."""

    async def close(self) -> None: ...


class AlertDispatcher:
    """Use as a context manager, or call `start` before and `close` behind everything else."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        queue: DeliveryQueue | None = None,
        *,
        first_back_off_s: float = FIRST_BACK_OFF_S,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._sinks = list(sinks)
        self._queue = queue or DeliveryQueue()
        self._first_back_off_s = first_back_off_s
        self._attempt_timeout_s = attempt_timeout_s
        self._wall_clock = wall_clock
        self._inbox: deque[tuple[str, bytes | None]] = deque()
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop
        self._news: dict[str, asyncio.Event] = {}
        self._stop: asyncio.Future[float]
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main()), name="edge-vlm-alert-outputs", daemon=True
        )
        self.delivered = 0
        """Events taken by a receiver."""
        self.lost = 0
        """Events that a receiver refused, or that a full queue had no room for."""
        self.undelivered: dict[str, int] = {}
        """By receiver, when closed: events that it has not taken."""

    # ---- called from other threads -----------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def put(self, session_id: str, event: protocol.ServerEvent) -> None:
        """Hands an event over if it is about an alert's begin or end. Never waits."""
        if not isinstance(event, AlertEvent):
            return
        with self._lock:
            if self._is_closed or len(self._inbox) >= MAX_INBOX:
                why = "the outputs are closed" if self._is_closed else "the disk is too slow"
                self._lose(len(self._sinks), why)
                return
            self._inbox.append(_body(session_id, event, self._wall_clock()))
            self._loop.call_soon_threadsafe(self._take_in)

    def close(self, grace_s: float | None = None) -> None:
        """Waits until everything has arrived, at most `grace_s` (GRACE_S). Twice does no harm."""
        grace_s = GRACE_S if grace_s is None else grace_s
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(_resolve, self._stop, grace_s)
        self._thread.join()

    def raise_undelivered(self) -> None:
        """Behind `close`: raises DeliveryError if a receiver did not take everything."""
        if not self.undelivered:
            return
        numbers = ", ".join(f"{count} for {name}" for name, count in self.undelivered.items())
        kept = self._queue.path
        remedy = "keep them in a file with --alert-queue FILE"
        if kept is not None:
            remedy = f"they are kept in {kept} for the next run that names it"
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

    # ---- on the loop -------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = self._loop.create_future()
        self._news = {sink.name: asyncio.Event() for sink in self._sinks}
        self._started.set()
        tasks = [asyncio.create_task(self._deliver(sink)) for sink in self._sinks]
        grace_s = await self._stop
        deadline = self._loop.time() + grace_s
        while self._count_undelivered() and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.undelivered = self._count_undelivered()
        self._queue.close()

    def _count_undelivered(self) -> dict[str, int]:
        counts = {sink.name: self._queue.count(sink.name) for sink in self._sinks}
        return {name: count for name, count in counts.items() if count}

    def _take_in(self) -> None:
        while self._inbox:
            body, jpeg = self._inbox.popleft()
            for sink in self._sinks:
                try:
                    lost = self._queue.put(sink.name, body, jpeg)
                except sqlite3.Error as error:
                    self._lose(1, f"it cannot be kept: {error}")
                    continue
                if lost:
                    self._lose(lost, f"{sink.name} has not taken the events before it")
                self._news[sink.name].set()

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        log.warning("%d alert event(s) lost: %s", count, why)

    async def _deliver(self, sink: Sink) -> None:
        try:
            await sink.open()
            while True:
                delivery = self._queue.oldest(sink.name)
                if delivery is None:
                    self._news[sink.name].clear()
                    await self._news[sink.name].wait()
                    continue
                await self._send(sink, delivery)
        except Exception:
            log.exception("%s: a bug ended this alert output", sink.name)
        finally:
            await sink.close()

    async def _send(self, sink: Sink, delivery: QueuedAlert) -> None:
        """Until it has arrived, is refused, or was pushed out of the queue."""
        back_off_s = self._first_back_off_s
        is_away = False
        while True:
            try:
                await asyncio.wait_for(sink.send(delivery), self._attempt_timeout_s)
            except DeliveryRefused as error:
                self._lose(1, f"{sink.name} refused it: {error}")
                break
            except DeliveryError as error:
                why = str(error)
            except asyncio.TimeoutError:
                why = sink.trouble
            else:
                self.delivered += 1
                if is_away:
                    log.warning("%s is back", sink.name)
                break
            if not is_away:
                log.warning("%s does not take alerts, they wait for it: %s", sink.name, why)
                is_away = True
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
            newest = self._queue.oldest(sink.name)
            if newest is None or newest.number != delivery.number:
                return
        self._queue.remove(delivery.number)


def _body(session_id: str, event: AlertEvent, wall_s: float) -> tuple[str, bytes | None]:
    """What a receiver gets, as JSON without the picture, and the picture."""
    fields: dict[str, Any] = {
        name: getattr(event, name)
        for name in event.__struct_fields__
        if name not in ("sequence", "evidence")
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
