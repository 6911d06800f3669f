"""What an address in a request stands for: bytes in a data URI, a file of an allowed folder, or a
page elsewhere. Nothing is read or fetched that was not allowed. Blocks; not for an event loop."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from edge_vlm.errors import FrameDecodeError
from edge_vlm.errors.requests import MediaRefused
from edge_vlm.pixels.frames import still_size
from edge_vlm_runtime.openai.content import Media
from edge_vlm_runtime.openai.fetching import fetch


@dataclass(frozen=True, kw_only=True)
class MediaRules:
    """What requests may name besides data URIs."""

    folders: tuple[Path, ...] = ()
    """Files in these and below."""
    may_fetch: bool = False
    """http(s) addresses of the public internet."""
    max_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        # Once: who replaces a folder by a link later opens no other one.
        folders = tuple(folder.resolve() for folder in self.folders)
        object.__setattr__(self, "folders", folders)


def read_picture(media: Media, rules: MediaRules) -> bytes:
    """A JPEG, PNG, WebP or GIF whose header can be read and announces no giant.

    Raises MediaRefused.
    """
    if _scheme(media.url) == "file":
        path = _allowed_file(media, rules)
        data = path.read_bytes() if path.stat().st_size <= rules.max_bytes else b""
        if not data:
            raise _refused(media, "the file is empty or too large")
    else:
        data = _bytes_of(media, rules)
    try:
        still_size(data)
    except FrameDecodeError as error:
        raise _refused(media, str(error)) from error
    return data


def inline_picture(url: str, param: str) -> bytes:
    """Of a data URI, and of nothing else. Raises MediaRefused."""
    media = Media(kind="picture", url=url, param=param)
    if _scheme(url) != "data":
        raise _refused(media, "a picture comes as a data URI", "data:image/jpeg;base64,...")
    return read_picture(media, MediaRules())


@contextmanager
def video_file(media: Media, rules: MediaRules) -> Iterator[Path]:
    """A video as a file with a name that is new each time, gone afterwards. Raises MediaRefused."""
    with tempfile.TemporaryDirectory(prefix="edge-vlm-") as folder:
        place = Path(folder) / "video"
        if _scheme(media.url) == "file":
            place.symlink_to(_allowed_file(media, rules))
        else:
            place.write_bytes(_bytes_of(media, rules))
        yield place


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _bytes_of(media: Media, rules: MediaRules) -> bytes:
    scheme = _scheme(media.url)
    if scheme == "data":
        return _data(media)
    if scheme not in ("http", "https"):
        raise _refused(
            media,
            f"an address with the scheme {scheme[:20]!r} is not read",
            "send a data URI: data:image/jpeg;base64,...",
        )
    if not rules.may_fetch:
        raise _refused(
            media,
            "this server fetches nothing from elsewhere",
            "send a data URI, or start it with --allow-fetch",
        )
    return fetch(media.url, param=media.param, max_bytes=rules.max_bytes)


def _data(media: Media) -> bytes:
    head, comma, body = media.url.partition(",")
    if not comma:
        raise _refused(media, "a data URI has a comma before its data")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(media, f"the data is not base64: {error}") from error


def _allowed_file(media: Media, rules: MediaRules) -> Path:
    """Where it really lies. What is not allowed and what is not there get the same answer, so that
    nobody learns what files there are."""
    refusal = _refused(
        media,
        "no such file in a folder that this server may read",
        "start it with --allow-file FOLDER, or send a data URI",
    )
    try:
        parts = urlsplit(media.url)
        if parts.netloc not in ("", "localhost"):
            raise refusal
        path = Path(unquote(parts.path)).resolve(strict=True)
        allowed = any(map(path.is_relative_to, rules.folders)) and path.is_file()
    except (OSError, RuntimeError, ValueError):
        allowed = False
    if not allowed:
        raise refusal
    return path


def _refused(media: Media, why: str, remedy: str | None = None) -> MediaRefused:
    return MediaRefused(why, param=media.param, remedy=remedy)
