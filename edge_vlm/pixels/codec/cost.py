"""What a compressed picture would cost to decode, told by its first bytes. Nothing is decompressed.

A few kilobytes can cost minutes: each scan of a progressive JPEG goes over the whole picture again,
and each of a million empty segments is a step of somebody's loop.
"""

from __future__ import annotations

import re

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.codec.jpeg import plain_header

MAX_SCANS = 64
"""Of a JPEG; encoders write up to about a dozen."""
MAX_SEGMENTS = 2000
"""Of a file before its picture: colour profiles, EXIF, comments."""
MIN_CHUNK = 1024
"""Bytes of a PNG's chunk, on average; encoders write 8 KiB."""
MAX_JUNK = 1 << 16
"""Bytes of a JPEG that belong to nothing."""
CHEAP_PIXELS, CHEAP_BYTES = 2_500_000, 1 << 20
"""What has no more is decoded in some ten milliseconds."""
_JPEG, _PNG, _GIF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF8"
_SCAN, _END = 0xDA, 0xD9
_BARE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Behind a scan's data, in which 0xff is followed by 0 or counts restarts."""


def require_bounded(data: bytes) -> None:
    """Raises FrameDecodeError for a JPEG, PNG or GIF in more parts than any that was made to be
    looked at; says nothing about what is damaged."""
    if data[:2] == _JPEG:
        _require_bounded_jpeg(data)
    elif data[:8] == _PNG:
        _require_bounded_png(data)
    elif data[:4] == _GIF:
        _require_bounded_gif(data)


def is_cheap(data: bytes) -> bool:
    """Whether it is a usual JPEG of moderate size."""
    if len(data) > CHEAP_BYTES:
        return False
    header = plain_header(data)
    return header is not None and header.height * header.width <= CHEAP_PIXELS


def _require_bounded_jpeg(data: bytes) -> None:
    place, scans, segments, junk = 2, 0, 0, 0
    while place + 4 <= len(data):
        segments += 1
        if segments > MAX_SEGMENTS:
            raise _too_many(f"{MAX_SEGMENTS} segments", "JPEG")
        if data[place] != 0xFF:  # decoders go on at the next marker, however far that is
            following = data.find(0xFF, place)
            junk += (len(data) if following < 0 else following) - place
            if junk > MAX_JUNK:
                raise _too_many(f"{MAX_JUNK} bytes between its segments", "JPEG")
            if following < 0:
                return
            place = following
            continue
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker in _BARE:
            place += 2
            continue
        if marker == _END:
            return
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker != _SCAN:
            continue
        scans += 1
        if scans > MAX_SCANS:
            raise _too_many(f"{MAX_SCANS} scans", "JPEG")
        if scans == 1 and data.count(b"\xff\xda", place) < MAX_SCANS:
            return
        behind = _MARKER.search(data, place)
        if behind is None:
            return
        place = behind.start()


def _require_bounded_png(data: bytes) -> None:
    most = MAX_SEGMENTS + len(data) // MIN_CHUNK
    place, number = len(_PNG), 0
    while place + 8 <= len(data) and data[place + 4 : place + 8] != b"IEND":
        number += 1
        if number > most:
            raise _too_many(f"{most} chunks", "PNG")
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _require_bounded_gif(data: bytes) -> None:
    """Up to its first picture."""
    if len(data) < 13:
        return
    place, number = 13, 0
    if data[10] & 0x80:
        place += 3 << (1 + (data[10] & 7))
    while place < len(data) and data[place] not in b",;":
        is_block = data[place] == 0x21
        place += 2 if is_block else 1
        number += 1
        while is_block and place < len(data) and data[place] != 0 and number <= MAX_SEGMENTS:
            place += 1 + data[place]
            number += 1
        if number > MAX_SEGMENTS:
            raise _too_many(f"{MAX_SEGMENTS} blocks", "GIF")
        place += is_block


def _too_many(what: str, kind: str) -> FrameDecodeError:
    return FrameDecodeError(
        f"the {kind} has more than {what}", remedy=f"send it as a plain {kind}, encoded anew"
    )
