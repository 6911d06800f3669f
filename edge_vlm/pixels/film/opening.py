"""What is in a file or behind an address: opening it, and which of its tracks is watched.

PyAV is imported here and nowhere else in this package.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_vlm.errors import MissingExtraError, VideoUnreadable
from edge_vlm.pixels.orientation import Orientation

log = logging.getLogger(__name__)

TEXT_FORMATS = {"tty", "bin", "idf", "adf", "xbin"}
"""Demuxers that render any text as moving pictures."""
NO_ACCELERATION = "none"
ANY_ACCELERATION = "auto"
_NOT_WATCHED = 0x0400 | 0x0800
"""`AV_DISPOSITION_ATTACHED_PIC`, `AV_DISPOSITION_TIMED_THUMBNAILS`: a cover, not a film."""
_DEFAULT = 0x0001
_MATROSKA_DURATION = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
_CODEC = re.compile(r"\(Video: (\S+?),? (?:\(([^)]*)\))?")


def av() -> Any:
    """PyAV. Raises MissingExtraError."""
    try:
        import av as library
    except ImportError as error:
        raise MissingExtraError.for_library("av", "client") from error
    return library


def end_waits() -> None:
    """Whatever waits for a camera inside FFmpeg gives up, at the end of a program.

    FFmpeg asks PyAV meanwhile whether to go on. PyAV holds its clock against the time-out, and
    knows no other way to be told; asked after the interpreter has gone, it crashes.
    """
    core = sys.modules.get("av.container.core")
    if core is not None:
        core.time = SimpleNamespace(monotonic=lambda: math.inf)  # type: ignore[attr-defined]


def decoding_errors() -> tuple[type[BaseException], ...]:
    """What reading and decoding raise."""
    return (av().FFmpegError, OSError, ValueError)


def reason_of(error: BaseException) -> str:
    """Without the address, which may hold a password."""
    return str(getattr(error, "strerror", None) or error)


def local_file(path: Path) -> str:
    """As FFmpeg takes it, whatever its name is: `12:30.mp4` is no protocol."""
    return f"file:{path}"


def open_container(file: Any, *, hwaccel: str = NO_ACCELERATION, **options: Any) -> Any:
    """`file`, `options`: as for `av.open`. `hwaccel`: `none`, `auto`, or a device that PyAV names;
    where that does not work, the CPU decodes and a warning says so.

    Raises `decoding_errors`, MissingExtraError.
    """
    library = av()
    device = _device_of(hwaccel)
    if device is None:
        return library.open(file, **options)
    container = library.open(file, hwaccel=device, **options)
    contexts = [stream.codec_context for stream in container.streams.video]
    if not any(context is not None and context.is_hwaccel for context in contexts):
        _say_cpu(hwaccel, "not for this codec")
    return container


def _device_of(hwaccel: str) -> Any:
    """PyAV's `HWAccel`, or None where the CPU decodes. Nothing is opened for finding out: that
    would be one connection more to a camera."""
    if hwaccel == NO_ACCELERATION:
        return None
    library = getattr(av().codec, "hwaccel", None)
    if library is None:
        _say_cpu(hwaccel, "this PyAV has none")
        return None
    offered = library.hwdevices_available()
    if hwaccel not in (*offered, ANY_ACCELERATION):
        _say_cpu(hwaccel, f"{hwaccel} is not among {', '.join(offered) or 'none'}")
        return None
    for device in offered if hwaccel == ANY_ACCELERATION else [hwaccel]:
        if (why := _absence_of(device)) is None:
            log.info("%s decodes where it can", device)
            return library.HWAccel(device)
        _say_cpu(hwaccel, f"{device}: {why}")
    return None


@functools.lru_cache(maxsize=16)
def _absence_of(device: str) -> str | None:
    """Why it does not work on this machine; None if it does."""
    library = av()
    try:
        accelerated = library.codec.hwaccel.HWAccel(device, allow_software_fallback=False)
        context = library.CodecContext.create("h264", "r", hwaccel=accelerated)
        if not context.is_hwaccel:
            return "there is none for usual video"
    except (library.FFmpegError, OSError, NotImplementedError, RuntimeError, TypeError) as error:
        return reason_of(error)
    return None


def _say_cpu(hwaccel: str, why: str) -> None:
    level = logging.INFO if hwaccel == ANY_ACCELERATION else logging.WARNING
    log.log(level, "no hardware decoding (%s): the CPU decodes", why)


def track_of(container: Any, name: str) -> Any:
    """The video stream that is watched: never a cover; the file's default; the one with the most
    pixels. Raises VideoUnreadable."""
    if set(container.format.name.split(",")) & TEXT_FORMATS:
        raise VideoUnreadable("not a video but text", where=name)
    films = [s for s in container.streams.video if not int(s.disposition) & _NOT_WATCHED]
    if not films:
        raise VideoUnreadable("there is no video in it", where=name)

    def rank(stream: Any) -> tuple[bool, int, int]:
        context = stream.codec_context
        pixels = 0 if context is None else (context.width or 0) * (context.height or 0)
        return context is not None, int(stream.disposition) & _DEFAULT, pixels

    stream = max(films, key=rank)  # of equal ones the first
    if stream.codec_context is None:
        codec = _codec_without_decoder(container.name)
        raise VideoUnreadable(
            f"nothing here decodes the video in it{f': its codec is {codec}' if codec else ''}",
            where=name,
            remedy="convert it, for example: ffmpeg -i IN -c:v libx264 OUT.mp4",
        )
    return stream


def _codec_without_decoder(file: str) -> str | None:
    """Its name, or its four letters in the file. Only FFmpeg's log tells."""
    logging_of = av().logging
    if not file or not Path(file.removeprefix("file:")).is_file():
        return None
    level, skips = logging_of.get_level(), logging_of.get_skip_repeated()
    logging_of.set_level(logging_of.WARNING)
    logging_of.set_skip_repeated(False)
    try:
        with logging_of.Capture() as lines:
            av().open(file).close()
    finally:
        logging_of.set_level(level)
        logging_of.set_skip_repeated(skips)
    for found in (_CODEC.search(line) for *_, line in lines):
        if found is not None:
            letters = (found[2] or "").partition(" /")[0]
            return letters or None if found[1] == "none" else str(found[1])
    return None


def announced_duration_s(container: Any, stream: Any) -> float | None:
    """Of the track, as the file says; None where it does not."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    is_matroska = "matroska" in container.format.name
    # Matroska announces when it ends, which counts from 0 even if it begins later.
    begin_s = float((stream.start_time or 0) * stream.time_base) if is_matroska else 0.0
    tag = _MATROSKA_DURATION.match(stream.metadata.get("DURATION", ""))
    if tag is not None:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) - begin_s
    if container.duration is None or len(container.streams) > 1:  # sound may be longer
        return None
    return float(container.duration) / float(av().time_base) - begin_s


def orientation_of(picture: Any, exif: Orientation) -> Orientation:
    """Which way up a decoded picture is shown. `exif`: what the packet says, where FFmpeg's word
    cannot be read."""
    try:
        # Not `picture.side_data`: the picture would hold what holds it, until a whole collection.
        found = av().sidedata.sidedata.SideDataContainer(picture).get("DISPLAYMATRIX")
    except KeyError:
        found = None
    except ValueError:  # PyAV fails at kinds of side data that it does not know
        turned = Orientation.of_rotation(getattr(picture, "rotation", 0))
        return turned if exif is Orientation.UPRIGHT else exif
    if found is None:
        return exif
    return Orientation.of_matrix(np.frombuffer(bytes(found), np.int32).tolist())
