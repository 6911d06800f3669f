"""Cameras: always the newest picture there is, and never an end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from edge_vlm.errors import (
    VideoError,
    VideoUnreadable,
)
from edge_vlm_runtime.sources.container import (
    READ_TIMEOUT_S,
    FFmpegError,
    Picture,
    mask_credentials,
    open_container,
    open_pipe,
    reason_of,
    to_rgb,
)
from edge_vlm_runtime.sources.gstreamer import GstPipe

log = logging.getLogger(__name__)

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 10.0


class LiveSource:
    """A camera: always the newest picture, reconnecting with a growing pause when it goes away.

    Time is when a picture arrived, on this machine's monotonic clock.
    """

    is_live = True

    def __init__(
        self,
        url: str,
        fps: float,
        *,
        container_format: str | None = None,
        options: dict[str, str] | None = None,
        open_container: Callable[..., Any] = open_container,
        first_back_off_s: float = FIRST_BACK_OFF_S,
    ) -> None:
        """Raises VideoUnreadable when the camera cannot be opened the first time."""
        self.name = mask_credentials(url)
        self._interval_s = 1.0 / fps
        self._reopen = lambda: open_container(
            url, self.name, container_format=container_format, options=options
        )
        self._first_back_off_s = first_back_off_s
        self._closed = threading.Event()
        self._news = threading.Condition()
        self._newest: tuple[float, Any] | None = None
        self._container = self._reopen()
        self.reconnects = 0
        """How often the camera came back."""
        self._reader = threading.Thread(target=self._read, name="edge-vlm-camera", daemon=True)
        self._reader.start()

    def pictures(self) -> Iterator[Picture]:
        start_s: float | None = None
        due_s = 0.0
        while not self._closed.is_set():
            with self._news:
                if self._newest is None:
                    self._news.wait(0.25)
                newest, self._newest = self._newest, None
            if newest is None or newest[0] < due_s:
                continue
            arrived_s, frame = newest
            start_s = arrived_s if start_s is None else start_s
            due_s = max(due_s + self._interval_s, arrived_s + 0.75 * self._interval_s)
            yield Picture(rgb=to_rgb(frame, self.name), time_s=arrived_s - start_s)

    def close(self) -> None:
        self._closed.set()
        with self._news:
            self._news.notify_all()

    def _read(self) -> None:
        back_off_s = self._first_back_off_s
        while not self._closed.is_set():
            try:
                for frame in self._container.decode(video=0):
                    if self._closed.is_set():
                        return
                    back_off_s = self._first_back_off_s
                    with self._news:
                        self._newest = (time.monotonic(), frame)
                        self._news.notify_all()
                why = "the stream ended"
            except (FFmpegError, OSError) as error:
                why = reason_of(error)
            finally:
                self._container.close()
            log.warning("camera %s went away: %s", self.name, mask_credentials(why))
            while not self._closed.wait(back_off_s):
                back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
                try:
                    self._container = self._reopen()
                except VideoError as error:
                    log.warning("camera %s is still away: %s", self.name, error)
                    continue
                self.reconnects += 1
                log.warning("camera %s is back", self.name)
                break


class GstContainer:
    """A GStreamer pipeline in the place of a container."""

    def __init__(self, pipeline: str, name: str, fps: float) -> None:
        """Raises VideoNotFound, VideoUnreadable."""
        self._pipe = GstPipe(pipeline, fps, READ_TIMEOUT_S)
        try:
            self._container = open_pipe(self._pipe)
        except (FFmpegError, OSError, ValueError) as error:
            self._pipe.close()
            why = mask_credentials(self._pipe.last_words() or reason_of(error))
            raise VideoUnreadable(f"the pipeline gives no picture ({why})", where=name) from error

    def decode(self, video: int) -> Iterator[Any]:
        """Raises OSError when the pipeline ends with an error."""
        yield from self._container.decode(video=video)
        if why := self._pipe.last_words():
            raise OSError(why)

    def close(self) -> None:
        self._container.close()
        self._pipe.close()
