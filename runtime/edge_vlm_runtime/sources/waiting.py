"""A source that may not be there yet: it is opened as soon as it can be."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from edge_vlm.errors import VideoError
from edge_vlm_runtime.sources.container import Picture, Source
from edge_vlm_runtime.sources.live import FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S, OnAway, ignore
from edge_vlm_runtime.sources.masking import mask_credentials


class WaitingSource:
    """Opens another source when its pictures are asked for, again and again until it is there."""

    def __init__(
        self,
        name: str,
        open_it: Callable[[], Source],
        *,
        is_live: bool,
        on_away: OnAway = ignore,
        first_back_off_s: float = FIRST_BACK_OFF_S,
        patience_s: float = math.inf,
    ) -> None:
        """`on_away` is told why the source cannot be opened whenever that changes, on the thread
        that waits for pictures; what is told once it is open is the source's own to tell.
        `patience_s`: what does not open for so long is raised by `pictures`."""
        self.name = mask_credentials(name)
        self.is_live = is_live
        self.max_side: int | None = None
        self._open_it = open_it
        self._on_away = on_away
        self._first_back_off_s = first_back_off_s
        self._patience_s = patience_s
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._source: Source | None = None

    @property
    def counts(self) -> Counter[str]:
        source = self._source
        return Counter() if source is None else source.counts

    def pictures(self) -> Iterator[Picture]:
        """Once. Raises VideoError and its leaves."""
        source = self._opened()
        if source is not None:
            source.max_side = self.max_side
            yield from source.pictures()

    def _opened(self) -> Source | None:
        """None once closed."""
        back_off_s, why = self._first_back_off_s, ""
        deadline_s = time.monotonic() + self._patience_s
        while not self._closed.is_set():
            try:
                source = self._open_it()
            except VideoError as error:
                if time.monotonic() >= deadline_s:
                    raise
                if str(error) != why:
                    why = str(error)
                    self._on_away(why)
                self._closed.wait(min(back_off_s, max(0.0, deadline_s - time.monotonic())))
                back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
                continue
            with self._lock:  # closed meanwhile, or from now on closed with it
                self._source = source
                if not self._closed.is_set():
                    return source
            source.close()
        return None

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            source = self._source
        if source is not None:
            source.close()
