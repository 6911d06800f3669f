"""The thread that reads one camera and hands its pictures over, each as a JPEG with its time."""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Protocol

from edge_vlm.errors import VideoError
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime.sources.container import Picture
from edge_vlm_runtime.sources.open import is_live, open_source
from edge_vlm_runtime.sources.threads import reading_thread
from edge_vlm_runtime.sources.waiting import WaitingSource

log = logging.getLogger(__name__)

LIVE, WAITING, ENDED = "live", "waiting", "ended"


class Receiver(Protocol):
    """Whoever gets the pictures. Both are called on the reader's thread and must not block."""

    def picture(self, jpeg: bytes, captured_us: int) -> None:
        """`captured_us`: when it was taken, by this machine's monotonic clock, rising."""

    def state(self, state: str, detail: str | None) -> None:
        """LIVE, WAITING or ENDED, and why."""


class _Told:
    """What the source is given of a reader: were it the reader itself, decoders of cameras that are
    gone would stay until a whole collection."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.closed = threading.Event()

    def changed(self, why: str | None) -> None:
        if not self.closed.is_set():
            self.receiver.state(LIVE if why is None else WAITING, why)


class CameraReader:
    """Reads from `start` to `close`, through absences of the camera, or to the end of a file, which
    is played at its own speed."""

    def __init__(
        self,
        source: str,
        fps: float,
        receiver: Receiver,
        *,
        max_side: int,
        hwaccel: str,
        after_us: int = 0,
    ) -> None:
        """`max_side`: pixels of a picture's longer side; `after_us`: of the last picture before."""
        self._told = told = _Told(receiver)
        self._newest_us = after_us
        opener = functools.partial(open_source, source, fps, hwaccel=hwaccel, on_away=told.changed)
        self._source = WaitingSource(source, opener, is_live=is_live(source), on_away=told.changed)
        self._source.max_side = max_side
        self._thread = reading_thread("edge-vlm-reader", self._run, self.close)

    @property
    def newest_us(self) -> int:
        """Capture time of the last picture."""
        return self._newest_us

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends soon; nothing is handed over afterwards, except what is just under way."""
        self._told.closed.set()
        self._source.close()

    def wait(self, timeout_s: float) -> bool:
        """Until the thread has ended; False when that takes longer."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        detail: str | None = None
        try:
            self._read()
        except VideoError as error:
            detail = str(error)
            log.warning("camera %s ends: %s", self._source.name, detail)
        except Exception:
            detail = "it is no longer read, because of a bug: see the server's log"
            log.exception("camera %s is no longer read", self._source.name)
        if not self._told.closed.is_set():
            self._told.receiver.state(ENDED, detail)

    def _read(self) -> None:
        told = self._told
        base_us: int | None = None
        for picture in self._source.pictures():
            now_us = time.monotonic_ns() // 1000
            time_us = round(picture.time_s * 1e6)
            if base_us is None:
                told.changed(None)
                base_us = max(now_us - _age_us(picture), self._newest_us + 1) - time_us
            captured_us = max(base_us + time_us, self._newest_us + 1)
            if not self._source.is_live and told.closed.wait((captured_us - now_us) * 1e-6):
                return
            jpeg = encode_jpeg(picture.rgb)
            if told.closed.is_set():
                return
            self._newest_us = captured_us
            told.receiver.picture(jpeg, captured_us)


def _age_us(picture: Picture) -> int:
    return round(picture.age_s * 1e6)
