"""Which source a text names.

A source gives pictures with times, already thinned to the wanted rate. Files give every due picture
and then end; live sources give the newest picture there is, and never end by themselves.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edge_vlm.errors import VideoNotFound, VideoUnreadable
from edge_vlm.pixels.film.opening import NO_ACCELERATION
from edge_vlm.pixels.video import Video, VideoTimes, probe_video
from edge_vlm_runtime.sources.addresses import (
    LIVE_SCHEMES,
    host_of,
    is_file_address,
    open_camera,
    scheme_of,
)
from edge_vlm_runtime.sources.container import Source
from edge_vlm_runtime.sources.gstreamer import GstCamera, csi_pipeline
from edge_vlm_runtime.sources.live import LiveSource, OnAway, ignore
from edge_vlm_runtime.sources.masking import mask_credentials
from edge_vlm_runtime.sources.street import StreetSource, is_street, require_rate, seed_of
from edge_vlm_runtime.sources.video_file import FileSource

CSI = re.compile(r"csi(?::(\d+))?", re.IGNORECASE)
GST = "gst:"
WEBCAM = re.compile(r"(?:webcam(?::(\d+))?|/dev/video(\d+))", re.IGNORECASE)
STANDARD_INPUT = "-"
KINDS = (
    "a video file, webcam, webcam:1, /dev/video1, rtsp://..., http://..., csi, gst:PIPELINE or demo"
)


def open_source(
    text: str, fps: float, *, hwaccel: str = NO_ACCELERATION, on_away: OnAway = ignore
) -> Source:
    """A file, `webcam`, `webcam:1`, `/dev/video1`, `rtsp://...` and other addresses, `csi`,
    `csi:1`, `-` (standard input), `demo`, `demo:7` (a rendered street), or `gst:` and a GStreamer
    pipeline that ends in raw video, at most `fps` pictures a second. `hwaccel`: as for
    `open_container`; `on_away`: see `LiveSource`.

    Raises VideoNotFound, VideoUnreadable; VideoEmpty only when the pictures are read.
    """
    name = mask_credentials(text)
    if is_street(text):
        return StreetSource(text, fps, on_away)
    csi = CSI.fullmatch(text)
    if csi is not None or text[: len(GST)].lower() == GST:
        pipeline = text[len(GST) :] if csi is None else csi_pipeline(int(csi.group(1) or 0))
        return LiveSource(text, fps, lambda: GstCamera(pipeline, name, fps), on_away=on_away)
    webcam = WEBCAM.fullmatch(text)
    if webcam is not None or text.startswith("/dev/v4l/") or _is_device(text):
        device = text
        if webcam is not None:
            device = f"/dev/video{webcam.group(1) or webcam.group(2) or 0}"
        if not Path(device).exists():
            raise VideoNotFound(
                f"there is no camera {device}", remedy="plug one in or use the browser page"
            )
        opener = functools.partial(open_camera, device, format="v4l2", hwaccel=hwaccel)
        return LiveSource(device, fps, opener, on_away=on_away)
    scheme = scheme_of(text)
    if scheme in LIVE_SCHEMES and not is_file_address(text):
        options: dict[str, Any] = {"hwaccel": hwaccel}
        if scheme in ("rtsp", "rtsps"):
            options["options"] = {"rtsp_transport": "tcp"}
        return LiveSource(text, fps, lambda: open_camera(text, **options), on_away=on_away)
    return open_file(text, fps, hwaccel=hwaccel)


def is_live(text: str) -> bool:
    """Whether `open_source` gives pictures without an end for it; nothing is opened."""
    if is_street(text):
        return True
    is_camera = CSI.fullmatch(text) or WEBCAM.fullmatch(text) or text.startswith("/dev/v4l/")
    if is_camera or text[: len(GST)].lower() == GST or _is_device(text):
        return True
    return scheme_of(text) in LIVE_SCHEMES and not is_file_address(text)


def require_source(text: str, fps: float | None = None) -> None:
    """That it names something which may be there one day, and may give `fps` pictures a second;
    nothing is opened.

    Raises VideoUnreadable.
    """
    name = mask_credentials(text)
    if is_street(text):
        seed_of(text)
        if fps is not None:
            require_rate(text, fps)
        return
    scheme = scheme_of(text)
    if scheme is None:
        word, colon, _ = text.partition(":")
        if text.strip().lower() == GST:
            raise VideoUnreadable("gst: wants a pipeline", where=name, remedy=KINDS)
        if colon and word.lower() in ("webcam", "csi") and not is_live(text):
            raise VideoUnreadable(f"{word}: wants a number", where=name, remedy=f"{word}:0")
    elif scheme != "file" and scheme not in LIVE_SCHEMES:
        raise VideoUnreadable(f"no source is read by {scheme}://", where=name, remedy=KINDS)
    elif scheme != "file" and not host_of(text):
        raise VideoUnreadable("the address has no host", where=name, remedy=f"{scheme}://HOST/...")


def is_path(text: str) -> bool:
    """Whether it names a file by its path."""
    return text != STANDARD_INPUT and scheme_of(text) is None and not is_live(text)


def open_file(text: str, fps: float, *, hwaccel: str = NO_ACCELERATION) -> Source:
    """A path, `file://...`, the http address of a file, or `-`.

    Raises VideoNotFound, VideoUnreadable; VideoEmpty only when the pictures are read.
    """
    if text == STANDARD_INPUT:
        return FileSource(Video("pipe:0", "standard input", hwaccel=hwaccel), fps)
    if is_file_address(text):
        return FileSource(open_camera(text, is_live=False, hwaccel=hwaccel), fps)
    return FileSource(_local_file(text), fps)


def whole_file(text: str) -> tuple[Path, VideoTimes] | None:
    """A file that can be read twice and the times of its frames; None for standard input,
    pipes and addresses.

    Raises VideoNotFound, VideoUnreadable, VideoEmpty.
    """
    if text == STANDARD_INPUT or is_file_address(text):
        return None
    path = _local_file(text)
    if path.exists() and not path.is_file():  # a pipe, /dev/stdin
        return None
    return path, probe_video(path)


def _local_file(text: str) -> Path:
    """Raises VideoNotFound, VideoUnreadable for the address of what is no file."""
    scheme = scheme_of(text)
    if scheme == "file":
        return Path(unquote(urlsplit(text).path))
    name = mask_credentials(text)
    if scheme is not None and not Path(text).exists():
        nearest = "watch it with `edge-vlm watch --source`" if scheme in LIVE_SCHEMES else KINDS
        raise VideoUnreadable(f"{scheme}:// is not a file", where=name, remedy=nearest)
    path = Path(text)
    if not path.exists():
        remedy = f"the camera of this number is webcam:{text}" if text.isdigit() else None
        if is_street(text):
            remedy = f"the demo street is watched with `edge-vlm watch --source {text}`"
        raise VideoNotFound("no such file", where=name, remedy=remedy)
    return path


def _is_device(text: str) -> bool:
    try:
        return Path(text).is_char_device()
    except (OSError, ValueError):
        return False
