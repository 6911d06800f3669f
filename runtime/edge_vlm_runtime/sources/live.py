"""Cameras: always the newest picture there is, and never an end."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from edge_vlm.errors import VideoError, VideoUnreadable
from edge_vlm.pixels.video import TimedFrame
from edge_vlm_runtime.sources.container import Picture
from edge_vlm_runtime.sources.masking import mask_credentials
from edge_vlm_runtime.sources.threads import reading_thread

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 10.0
LEAST_GAP_S = 1e-3
"""Between two pictures, whatever the camera's clock says."""


class Camera(Protocol):
    """An opened one."""

    @property
    def counts(self) -> Counter[str]:
        """As of `pixels.video.Video`."""

    def decoded(self) -> Iterator[TimedFrame]:
        """Its frames, as they come. Ends or raises when the camera goes away."""

    def close(self) -> None: ...


OnAway = Callable[[str | None], None]
"""Told why a camera gives no pictures, and None when it gives them again; on any thread."""


def ignore(why: str | None) -> None:
    """For whoever does not mind."""


class LiveSource:
    """A camera: always the newest picture, reconnecting with a growing pause when it goes away.

    Time is when the camera saw a picture, by its own clock held against this machine's monotonic
    one; where it has none, when the picture arrived.
    """

    is_live = True

    def __init__(
        self,
        name: str,
        fps: float,
        open_camera: Callable[[], Camera],
        *,
        first_back_off_s: float = FIRST_BACK_OFF_S,
        on_away: OnAway = ignore,
    ) -> None:
        """Raises VideoUnreadable when the camera cannot be opened the first time."""
        self.name = mask_credentials(name)
        self._interval_s = 1.0 / fps
        self._open_camera = open_camera
        self._first_back_off_s = first_back_off_s
        self._on_away = on_away
        self._is_away = True
        self._closed = threading.Event()
        self._news = threading.Condition()
        """Guards the two below; notified when either changes, and by `close`."""
        self._newest: tuple[float, TimedFrame] | None = None
        self._died_of: BaseException | None = None
        self._camera = open_camera()
        self._counted: Counter[str] = Counter()
        """By cameras that went away."""
        self.max_side: int | None = None
        self.reconnects = 0
        """How often the camera came back."""
        self._reader = reading_thread("edge-vlm-camera", self._read, self.close)
        self._reader.start()

    @property
    def counts(self) -> Counter[str]:
        return self._counted + self._camera.counts

    def pictures(self) -> Iterator[Picture]:
        """Raises VideoUnreadable when nothing reads the camera any more."""
        start_s: float | None = None
        due_s, time_s = 0.0, -LEAST_GAP_S
        while (newest := self._take(due_s)) is not None:
            arrived_s, frame = newest
            due_s = max(due_s + self._interval_s, arrived_s + 0.75 * self._interval_s)
            rgb = frame.rgb(self.max_side)
            captured_s = arrived_s if frame.captured_s is None else frame.captured_s
            start_s = captured_s if start_s is None else start_s
            time_s = max(captured_s - start_s, time_s + LEAST_GAP_S)
            yield Picture(rgb=rgb, time_s=time_s, age_s=time.monotonic() - captured_s)

    def close(self) -> None:
        self._closed.set()
        with self._news:
            self._news.notify_all()

    def _take(self, due_s: float) -> tuple[float, TimedFrame] | None:
        """Waits for a frame that arrived at `due_s` or later; None once closed."""

        def is_due() -> bool:
            is_new = self._newest is not None and self._newest[0] >= due_s
            return is_new or self._closed.is_set() or self._died_of is not None

        with self._news:
            self._news.wait_for(is_due)
            if self._closed.is_set():
                return None
            if self._died_of is not None:
                raise VideoUnreadable(
                    f"the camera is no longer read ({_words_of(self._died_of)})", where=self.name
                ) from self._died_of
            newest, self._newest = self._newest, None
            return newest

    def _read(self) -> None:
        """The thread: whatever ends it, whoever waits for a picture is told."""
        try:
            self._read_for_ever()
        except BaseException as error:  # noqa: BLE001 (handed to `pictures`)
            log.error("camera %s is no longer read: %s", self.name, _words_of(error))
            with self._news:
                self._died_of = error
                self._news.notify_all()

    def _read_for_ever(self) -> None:
        back_off_s = self._first_back_off_s
        while not self._closed.is_set():
            try:
                try:
                    for frame in self._camera.decoded():
                        if self._closed.is_set():
                            return
                        back_off_s = self._first_back_off_s
                        if self._is_away:
                            self._is_away = False
                            self._on_away(None)
                        with self._news:
                            self._newest = (time.monotonic(), frame)
                            self._news.notify_all()
                    why = "the stream ended"
                finally:
                    self._camera.close()
            except Exception as error:  # noqa: BLE001 (logged; the camera is opened again)
                why = _words_of(error)
            if self._closed.is_set():
                return
            log.warning("camera %s went away: %s", self.name, why)
            self._is_away = True
            self._on_away(why)
            while not self._closed.wait(back_off_s):
                back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
                try:
                    camera = self._open_camera()
                    self._counted, self._camera = self.counts, camera
                except Exception as error:  # noqa: BLE001 (logged; tried again)
                    log.warning("camera %s is still away: %s", self.name, _words_of(error))
                    continue
                self.reconnects += 1
                log.warning("camera %s is back", self.name)
                break


def _words_of(error: BaseException) -> str:
    what = error.what if isinstance(error, VideoError) else f"{type(error).__name__}: {error}"
    return mask_credentials(what)
