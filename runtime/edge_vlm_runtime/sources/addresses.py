"""Cameras and files behind an address, and what it means when one does not open."""

from __future__ import annotations

import re
import socket
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from edge_vlm.errors import VideoUnreadable
from edge_vlm.pixels.video import Video
from edge_vlm_runtime.sources.masking import mask_credentials

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 10.0
"""A camera silent for this long is opened again."""
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
LIVE_SCHEMES = {
    *("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt", "http", "https", "mms", "mmsh")
}
FILE_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".3gp", ".gif"),
    *(".jpg", ".jpeg", ".png", ".webp"),
}
"""What an http address that ends so gives is a file: it has a beginning and an end."""
_STATUS = {
    "HTTPUnauthorizedError": "it wants another user or password (401 Unauthorized)",
    "HTTPForbiddenError": "this user may not watch it (403 Forbidden)",
    "HTTPNotFoundError": "it answers, but has nothing at this path (404 Not Found)",
    "ProtocolNotFoundError": "the video library that is installed does not speak this protocol",
}


def scheme_of(text: str) -> str | None:
    """In lower case; None if `text` is no address."""
    found = SCHEME.match(text)
    return None if found is None else found[1].lower()


def host_of(url: str) -> str | None:
    """Name or number of the machine behind an address; None without one."""
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as half an IPv6 number
        return None


def is_file_address(url: str) -> bool:
    """Whether it names a file on a web server."""
    if scheme_of(url) not in ("http", "https"):
        return False
    return PurePosixPath(urlsplit(url).path).suffix.lower() in FILE_SUFFIXES


def open_camera(url: str, **options: Any) -> Video:
    """An address or a device. `options`: as for `Video`. Raises VideoUnreadable."""
    name = mask_credentials(url)
    scheme = scheme_of(url)
    if scheme is not None:
        url = scheme + url[len(scheme) :]
    try:
        return Video(
            url,
            name,
            refused="the camera does not answer",
            timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
            **{"is_live": True, **options},
        )
    except VideoUnreadable as error:
        cause = error.__cause__
        if scheme is None or cause is None:
            raise
        status = _STATUS.get(type(cause).__name__)
        if status is None and isinstance(cause, OSError) and _is_unknown_host(url):
            status = "no computer of this name is known"
        if status is None:
            raise VideoUnreadable(error.what, where=name, remedy=_remedy(url)) from cause
        what = f"the camera cannot be watched: {status}"
        raise VideoUnreadable(what, where=name, remedy=_remedy(url)) from cause


def _is_unknown_host(url: str) -> bool:
    try:
        socket.getaddrinfo(host_of(url) or "", None)
    except (OSError, UnicodeError):
        return True
    return False


def _remedy(url: str) -> str | None:
    """Of a password that is not written as addresses want it."""
    rest = url.partition("://")[2]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in rest[len(authority) :] or authority.count("@") > 1:
        return "in a user or password write # as %23, / as %2F, ? as %3F, @ as %40, : as %3A"
    return None
