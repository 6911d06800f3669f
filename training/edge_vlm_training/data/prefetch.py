"""Batches made in a thread while the last one is trained on."""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edge_vlm_training.data.packing.batch import Batch, BatchStream


class Prefetch:
    """A `BatchStream` that makes up to `depth` batches of another ahead.

    Its state is that after the last batch handed out, whatever was made since. Errors of the stream
    come out where its batch would have. Iterate once at a time; `close` it, or use it in a `with`,
    to end the thread.
    """

    def __init__(self, stream: BatchStream, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._stream, self._depth = stream, depth
        self._state = stream.state_dict()
        self._batches: Generator[Batch, None, None] | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stream.load_state_dict(self._state)
        self._batches = self._made()
        return self._batches

    def _made(self) -> Generator[Batch, None, None]:
        batches = iter(self._stream)

        def make() -> tuple[Batch, dict[str, Any]]:
            return next(batches), self._stream.state_dict()

        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            waiting = collections.deque(pool.submit(make) for _ in range(self._depth))
            while True:
                batch, self._state = waiting.popleft().result()
                waiting.append(pool.submit(make))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def close(self) -> None:
        """Ends the thread; what it has made ahead is made again when iteration goes on."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
