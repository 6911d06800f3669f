"""Batches made in a thread while the last one is trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from edge_vlm_training.data.packing.batch import Batch, BatchStream

_Made = tuple[Batch, dict[str, Any]]
_POLL_S = 0.2


class Prefetch:
    """A `BatchStream` that makes up to `depth` batches of another ahead.

    Its state is that behind the last batch handed out, whatever was made since. Errors of the
    stream come out where its batch would have. Iterate once at a time; `close` it, or use it in a
    `with`, to end the thread.
    """

    def __init__(self, stream: BatchStream, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._stream, self._depth = stream, depth
        self._state = stream.state_dict()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stream.load_state_dict(self._state)
        made: queue.Queue[_Made | BaseException] = queue.Queue(self._depth)
        stop = self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_make, args=(self._stream, made, stop), name="prefetch", daemon=True
        )
        self._thread.start()
        while not stop.is_set():
            try:
                item = made.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self.close()
                raise item
            batch, self._state = item
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def close(self) -> None:
        """Ends the thread; what it has made ahead is made again when iteration goes on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _make(
    stream: BatchStream, made: queue.Queue[_Made | BaseException], stop: threading.Event
) -> None:
    item: _Made | BaseException
    batches = iter(stream)
    while not stop.is_set():
        try:
            item = (next(batches), stream.state_dict())
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                made.put(item, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
