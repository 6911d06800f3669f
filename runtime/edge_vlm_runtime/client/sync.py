"""The client for scripts without asyncio: each call blocks until it is done.

with SyncClient("localhost:8765") as client:
    client.send_frame(rgb)
    print(client.ask("what is there?").shown_text)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.answers import Answer, AnswerStream, FrameCounts
from edge_vlm_runtime.client.client import Client, Detail
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.client.events import EventStream, Kind
from edge_vlm_runtime.client.exchange import OnEvent
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.settings import SessionSettings
from edge_vlm_runtime.protocol.typed import RuleFields, Settings

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

Result = TypeVar("Result")

SETTLE_S = 2.0


class SyncClient:
    """A `Client` on an event loop of its own thread. Several threads may use it, as several tasks
    may use a `Client`. Its methods raise what those of `Client` raise."""

    def __init__(
        self,
        url: str,
        settings: Settings | None = None,
        *,
        access: Access | None = None,
        reconnect: bool = True,
        on_event: OnEvent | None = None,
    ) -> None:
        """`on_event`: as of `Client.connect`, called on the loop's thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="edge-vlm-client", daemon=True
        )
        self._thread.start()
        self._lock = threading.Lock()
        self._is_ended = False
        """The loop takes no more work; set with the lock, so that none is given to it unseen."""
        try:
            opening = Client.connect(
                url, settings, on_event=on_event, access=access, reconnect=reconnect
            )
            self._client = self._wait(opening)
        except BaseException:
            self._end_loop()
            raise

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Ctrl-C in this thread cancels the work."""
        with self._lock:
            if self._is_ended:
                work.close()
                raise _Closed("the client was closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise _Closed("the client was closed") from None
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _end_loop(self) -> None:
        with self._lock:
            if self._is_ended:
                return
            self._is_ended = True
            settling = asyncio.run_coroutine_threadsafe(_settle(), self._loop)
        settling.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- what is known -----------------------------------------------------------------------

    @property
    def created(self) -> protocol.SessionCreated | protocol.SessionResumed:
        """The server's first event."""
        return self._client.created

    @property
    def settings(self) -> SessionSettings:
        """In force now."""
        return self._client.settings

    @property
    def frames(self) -> FrameCounts:
        """What became of the frames so far."""
        return self._client.frames

    @property
    def notes(self) -> list[str]:
        """What the server says of these settings with its model."""
        return self._client.notes

    # ---- what a script does ------------------------------------------------------------------

    def update(self, settings: Settings) -> protocol.SessionUpdated:
        """See `Client.update`."""
        return self._wait(self._client.update(settings))

    def send_frame(self, picture: bytes | np.ndarray, pts_us: int | None = None) -> int:
        """See `Client.send_frame`."""
        return self._wait(self._client.send_frame(picture, pts_us))

    def wait_processed(self) -> None:
        """See `Client.wait_processed`."""
        self._wait(self._client.wait_processed())

    def say(self, text: str) -> None:
        """See `Client.say`."""
        self._wait(self._client.say(text))

    def ask(self, text: str, detail: Detail = "video") -> Answer:
        """See `Client.ask`."""
        return self._wait(self._client.ask(text, detail))

    def start_answer(self, text: str, detail: Detail = "video") -> SyncAnswer:
        """Iterate over it for the pieces of the answer. See `Client.start_answer`."""
        return SyncAnswer(self, self._wait(self._client.start_answer(text, detail)))

    def cancel(self, response_id: str | None = None) -> None:
        """See `Client.cancel`."""
        self._wait(self._client.cancel(response_id))

    def create_alert(self, question: str, **rule: Unpack[RuleFields]) -> messages.AlertStatus:
        """See `Client.create_alert`."""
        return self._wait(self._client.create_alert(question, **rule))

    def list_alerts(self) -> list[messages.AlertStatus]:
        """See `Client.list_alerts`."""
        return self._wait(self._client.list_alerts())

    def delete_alert(self, alert_id: str) -> None:
        """See `Client.delete_alert`."""
        self._wait(self._client.delete_alert(alert_id))

    @overload
    def events(self) -> SyncEvents[protocol.ServerEvent]: ...

    @overload
    def events(self, *kinds: type[Kind]) -> SyncEvents[Kind]: ...

    def events(self, *kinds: type[Any]) -> SyncEvents[Any]:
        """See `Client.events`: `for`, which waits for the next one."""
        return SyncEvents(self, self._wait(_made(self._client, *kinds)))

    def alerts(self) -> SyncEvents[messages.AlertTriggered | messages.AlertCleared]:
        """Begins and ends of alerts from now on: `for`, which waits for the next one."""
        return self.events(messages.AlertTriggered, messages.AlertCleared)

    def raise_failure(self) -> None:
        """Raises what has ended the client, if anything."""
        self._wait(self._client.check())

    def close(self) -> None:
        """See `Client.close`. Iterators of other threads end. Twice does no harm."""
        self._shut(self._client.close)

    def _shut(self, close: Any) -> None:
        if not self._is_ended:
            try:
                self._wait(close())
            finally:
                self._end_loop()

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shut(lambda: self._client.__aexit__(kind, error, trace))


class _Closed(RuntimeError):
    pass


async def _settle() -> None:
    """What other threads wait for has its end by now, and tells it."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, late = await asyncio.wait(others, timeout=SETTLE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


async def _made(client: Client, *kinds: type[Any]) -> EventStream[Any]:
    return client.events(*kinds)


class SyncEvents(Generic[Kind]):
    """An `EventStream` that blocks."""

    def __init__(self, client: SyncClient, stream: EventStream[Kind]) -> None:
        self._client = client
        self._stream = stream

    def __iter__(self) -> Iterator[Kind]:
        return self

    def __next__(self) -> Kind:
        try:
            return self._client._wait(self._stream.__anext__())
        except _Closed:  # the stream has its end, and perhaps events before it
            try:
                return self._stream.take()
            except StopAsyncIteration:
                raise StopIteration from None
        except StopAsyncIteration:
            raise StopIteration from None


class SyncAnswer:
    """An `AnswerStream` that blocks: iterate for its deltas, then read `answer`."""

    def __init__(self, client: SyncClient, stream: AnswerStream) -> None:
        self._client = client
        self._stream = stream
        self._deltas = stream.__aiter__()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return self._client._wait(_next(self._deltas))
        except StopAsyncIteration:
            raise StopIteration from None

    def answer(self) -> Answer:
        """The whole answer."""
        return self._client._wait(self._stream.answer())


async def _next(deltas: Any) -> str:
    delta: str = await deltas.__anext__()
    return delta
