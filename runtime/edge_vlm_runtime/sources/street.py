"""`demo`: an endless rendered street of the demo model's things in the place of a camera."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edge_vlm.errors import VideoUnreadable
from edge_vlm.pixels.film.reading import TimedFrame
from edge_vlm.pixels.frames import Rgb
from edge_vlm.world.street import MOST_SEED, PICTURE_SIDE, Street
from edge_vlm_runtime.sources.live import LiveSource, OnAway, ignore

STREET = re.compile(r"demo(?::(.*))?", re.IGNORECASE | re.DOTALL)
USUAL_SEED = 0
MOST_STREET_FPS = 30.0
EXAMPLE = "demo or demo:7, a whole number"


def is_street(text: str) -> bool:
    """Whether it is meant to name one; the seed may be none."""
    return STREET.fullmatch(text) is not None


def seed_of(text: str) -> int:
    """Of `demo` and `demo:7`. Raises VideoUnreadable for another seed than a whole number from 0
    to MOST_SEED."""
    found = STREET.fullmatch(text)
    assert found is not None, "asked before by `is_street`"
    given = found[1]
    if given is None:
        return USUAL_SEED
    if not re.fullmatch(r"[0-9]{1,10}", given) or int(given) > MOST_SEED:
        raise VideoUnreadable(
            f"demo: wants a whole number from 0 to {MOST_SEED}, got {given[:40]!r}",
            where=text[:60],
            remedy=EXAMPLE,
        )
    return int(given)


def require_rate(text: str, fps: float) -> None:
    """Raises VideoUnreadable for a rate at which a street is not rendered."""
    if not 0 < fps <= MOST_STREET_FPS:
        raise VideoUnreadable(
            f"the demo street gives up to {MOST_STREET_FPS:g} pictures a second, got {fps:g}",
            where=text[:60],
            remedy="a lower --fps, or fps in the camera's table",
        )


@dataclass(frozen=True, eq=False)
class _StreetFrame(TimedFrame):
    """Rendered when somebody looks at it. `picture` is the street."""

    def rgb(self, max_side: int | None = None) -> Rgb:
        side = PICTURE_SIDE if max_side is None else min(PICTURE_SIDE, max_side)
        street: Street = self.picture
        return street.picture(self.time_s, side)


class StreetCamera:
    """Runs in real time from when it is opened, at steps of 1 / fps of the street's time; whoever
    is slower misses pictures, as of any camera."""

    def __init__(
        self,
        text: str,
        fps: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        """`clock` in seconds; `wait` waits for the event or for so long. Raises VideoUnreadable."""
        require_rate(text, fps)
        self._name = text
        self._fps = fps
        self._street = Street(seed_of(text))
        self._clock, self._wait = clock, wait
        self._closed = threading.Event()
        self.counts: Counter[str] = Counter()
        self._began_s = clock()

    def decoded(self) -> Iterator[TimedFrame]:
        number = 0
        while not self._closed.is_set():
            now_s = self._clock() - self._began_s
            number = max(number, math.floor(now_s * self._fps))
            due_s = number / self._fps
            if due_s > now_s:
                self._wait(self._closed, due_s - now_s)
                continue
            yield _StreetFrame(
                time_s=due_s,
                end_s=(number + 1) / self._fps,
                picture=self._street,
                name=self._name,
                captured_s=self._began_s + due_s,
            )
            number += 1

    def close(self) -> None:
        """On any thread: whoever waits for a picture of it is told."""
        self._closed.set()


class StreetSource(LiveSource):
    """A street as any camera is watched."""

    def __init__(self, text: str, fps: float, on_away: OnAway = ignore) -> None:
        """Raises VideoUnreadable."""
        self._street: StreetCamera | None = None
        super().__init__(text, fps, lambda: self._opened(text, fps), on_away=on_away)

    def _opened(self, text: str, fps: float) -> StreetCamera:
        self._street = StreetCamera(text, fps)
        return self._street

    def close(self) -> None:
        super().close()
        if self._street is not None:
            self._street.close()
