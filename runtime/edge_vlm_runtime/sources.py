"""Where pictures come from: a video file, a webcam, an RTSP camera, a GStreamer pipeline. PyAV is
imported only here.

A source gives pictures with times, already thinned to the wanted rate. Files give every due picture
and then end; live sources give the newest picture there is, and never end by themselves.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_vlm.errors import (
    MissingExtraError,
    VideoEmpty,
    VideoError,
    VideoNotFound,
    VideoUnreadable,
)
from edge_vlm_runtime.gst_pipe import GstPipe, csi_pipeline

try:
    import av
except ImportError as error:
    raise MissingExtraError.for_library("av", "ort") from error

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 10.0
"""A camera silent for this long is opened again."""
FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 10.0
EPSILON_S = 1e-4
CUT_OFF_TOLERANCE_S = 0.5
CSI = re.compile(r"csi(?::(\d+))?")
GST = "gst:"
WEBCAM = re.compile(r"(?:webcam(?::(\d+))?|/dev/video(\d+))")
CREDENTIALS = re.compile(r"(\w+://)\S*@")
NOT_VIDEO_FORMATS = {"tty", "bin", "idf", "adf", "xbin"}
"""Demuxers that render any text as moving pictures."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """rgb u8 [H, W, 3] and its time in seconds from the start of the source."""

    rgb: np.ndarray
    time_s: float


class Source(Protocol):
    name: str
    """For people; credentials are masked."""
    is_live: bool

    def pictures(self) -> Iterator[Picture]:
        """Blocks until the next picture. Raises VideoError and its leaves."""

    def close(self) -> None:
        """Makes `pictures` end soon. May be called from another thread, and twice."""


def open_source(text: str, fps: float) -> Source:
    """A file, `webcam`, `webcam:1`, `/dev/video1`, `rtsp://...`, `csi`, `csi:1`, or `gst:` and a
    GStreamer pipeline that ends in raw video, at most `fps` pictures a second.

    Raises VideoNotFound, VideoUnreadable; VideoEmpty only when the pictures are read.
    """
    csi = CSI.fullmatch(text)
    if csi is not None or text.startswith(GST):
        pipeline = text[len(GST) :] if csi is None else csi_pipeline(int(csi.group(1) or 0))
        return LiveSource(
            text, fps, open_container=lambda url, name, **_: _GstContainer(pipeline, name, fps)
        )
    webcam = WEBCAM.fullmatch(text)
    if webcam is not None:
        device = f"/dev/video{webcam.group(1) or webcam.group(2) or 0}"
        if not Path(device).exists():
            raise VideoNotFound(
                f"there is no camera {device}", remedy="plug one in or use the browser page"
            )
        return LiveSource(device, fps, container_format="v4l2")
    if text.startswith(("rtsp://", "rtsps://")):
        return LiveSource(text, fps, options={"rtsp_transport": "tcp"})
    return FileSource(text, fps)


def mask_credentials(text: str) -> str:
    """User and password of any URL in `text` become ***."""
    return CREDENTIALS.sub(r"\1***@", text)


class FileSource:
    """The pictures a player would show at 0, 1/fps, 2/fps ... seconds."""

    is_live = False

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._fps = fps
        self._closed = False
        if not self.path.exists():
            raise VideoNotFound("no such file", where=self.path)
        self._container = _open(str(self.path), self.name)
        self._stream = _video_stream(self._container, self.name)

    @property
    def duration_s(self) -> float | None:
        """As the file announces it."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return None if container.duration is None else container.duration / av.time_base

    def pictures(self) -> Iterator[Picture]:
        for time_s, frame in due_frames(self._decoded(), self._fps):
            yield Picture(rgb=_rgb(frame, self.name), time_s=time_s)

    def _decoded(self) -> Iterator[Shown]:
        """Every frame of the file. Raises VideoUnreadable where the file is broken or cut off."""
        start_s: float | None = None
        end_s = 0.0
        try:
            for frame in self._container.decode(self._stream):
                if self._closed:
                    return
                at_s = end_s if frame.time is None else float(frame.time)
                start_s = at_s if start_s is None else start_s
                length_s = float((frame.duration or 0) * (frame.time_base or 0))
                end_s = at_s - start_s + length_s
                yield Shown(at_s - start_s, end_s, frame)
        except av.FFmpegError as error:
            raise VideoUnreadable(
                f"the file is broken or cut off after {end_s:.1f} s ({_reason(error)})",
                where=self.path,
            ) from error
        if start_s is None:
            raise VideoEmpty("the file holds no frame", where=self.path)
        announced_s = self.duration_s
        if announced_s is not None and end_s < 0.9 * announced_s - CUT_OFF_TOLERANCE_S:
            raise VideoUnreadable(
                f"the file is cut off: it ends after {end_s:.1f} of {announced_s:.1f} s",
                where=self.path,
            )

    def close(self) -> None:
        self._closed = True


@dataclass(frozen=True)
class Shown:
    """A decoded frame and when a player would show it."""

    start_s: float
    end_s: float
    frame: Any


def due_frames(frames: Iterable[Shown], fps: float) -> Iterator[tuple[float, Any]]:
    """What is on screen at 0, 1/fps, 2/fps ... seconds, each frame once at most."""
    tick = 0
    shown: Shown | None = None

    def ticks_until(end_s: float) -> Iterator[float]:
        nonlocal tick
        while tick / fps < end_s - EPSILON_S:
            yield tick / fps
            tick += 1

    for following in frames:
        if shown is not None:
            due = list(ticks_until(following.start_s))
            if due:
                yield due[0], shown.frame
        shown = following
    if shown is not None:
        due = list(ticks_until(max(shown.end_s, shown.start_s + 2 * EPSILON_S)))
        if due:
            yield due[0], shown.frame


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
        open_container: Callable[..., Any] | None = None,
        first_back_off_s: float = FIRST_BACK_OFF_S,
    ) -> None:
        """Raises VideoUnreadable when the camera cannot be opened the first time."""
        self.name = mask_credentials(url)
        self._interval_s = 1.0 / fps
        self._reopen = lambda: (open_container or _open)(
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
            yield Picture(rgb=_rgb(frame, self.name), time_s=arrived_s - start_s)

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
            except (av.FFmpegError, OSError) as error:
                why = _reason(error)
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


class _GstContainer:
    """A GStreamer pipeline in the place of a container."""

    def __init__(self, pipeline: str, name: str, fps: float) -> None:
        """Raises VideoNotFound, VideoUnreadable."""
        self._pipe = GstPipe(pipeline, fps, READ_TIMEOUT_S)
        try:
            self._container = av.open(self._pipe, format="yuv4mpegpipe")
        except (av.FFmpegError, OSError, ValueError) as error:
            self._pipe.close()
            why = mask_credentials(self._pipe.last_words() or _reason(error))
            raise VideoUnreadable(f"the pipeline gives no picture ({why})", where=name) from error

    def decode(self, video: int) -> Iterator[Any]:
        """Raises OSError when the pipeline ends with an error."""
        yield from self._container.decode(video=video)
        if why := self._pipe.last_words():
            raise OSError(why)

    def close(self) -> None:
        self._container.close()
        self._pipe.close()


def _open(
    url: str,
    name: str,
    *,
    container_format: str | None = None,
    options: dict[str, str] | None = None,
) -> Any:
    try:
        container = av.open(
            url,
            format=container_format,
            options=options or {},
            timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        live = options is not None or container_format is not None
        what = "the camera does not answer" if live else "not a video, or cut off at its beginning"
        raise VideoUnreadable(f"{what} ({mask_credentials(_reason(error))})", where=name) from error
    if set(container.format.name.split(",")) & NOT_VIDEO_FORMATS:
        container.close()
        raise VideoUnreadable("not a video but text", where=name)
    return container


def _video_stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        container.close()
        raise VideoUnreadable("there is no video in it", where=name)
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _rgb(frame: Any, name: str) -> np.ndarray:
    try:
        return np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
    except (av.FFmpegError, ValueError) as error:
        raise VideoUnreadable(f"a frame cannot be converted ({error})", where=name) from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
