"""Opening and reading containers with PyAV, which the runtime imports only here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_vlm.errors import (
    MissingExtraError,
    VideoUnreadable,
)

try:
    import av
except ImportError as error:
    raise MissingExtraError.for_library("av", "client") from error

FFmpegError = av.FFmpegError
TICKS_PER_S = av.time_base
"""Of a container's own duration."""
OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 10.0
"""A camera silent for this long is opened again."""
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


def mask_credentials(text: str) -> str:
    """User and password of any URL in `text` become ***."""
    return CREDENTIALS.sub(r"\1***@", text)


def open_container(
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
        raise VideoUnreadable(
            f"{what} ({mask_credentials(reason_of(error))})", where=name
        ) from error
    if set(container.format.name.split(",")) & NOT_VIDEO_FORMATS:
        container.close()
        raise VideoUnreadable("not a video but text", where=name)
    return container


def video_stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        container.close()
        raise VideoUnreadable("there is no video in it", where=name)
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def to_rgb(frame: Any, name: str) -> np.ndarray:
    try:
        return np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
    except (av.FFmpegError, ValueError) as error:
        raise VideoUnreadable(f"a frame cannot be converted ({error})", where=name) from error


def reason_of(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def open_pipe(pipe: Any) -> Any:
    """A container over what a pipeline writes. Raises FFmpegError, OSError, ValueError."""
    return av.open(pipe, format="yuv4mpegpipe")
