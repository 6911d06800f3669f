"""Usual JPEGs, decoded by libjpeg-turbo itself: the same pixels as Pillow's, in half the time.

The only module of this package that imports simplejpeg. Whatever is not usual is left to Pillow and
the rules of `frames`: damaged files, missing end markers, CMYK, other than eight bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import MissingExtraError

_SIZES = frozenset((0xC0, 0xC1, 0xC2))
"""Markers of frames (SOF) that are coded by Huffman's method."""
_APP1, _SCAN, _BARE = 0xE1, 0xDA, frozenset((0x01, *range(0xD0, 0xD8)))
_EXIF = b"Exif\0\0"
MAX_STEPS = 400
"""Through the segments before the picture, and the bytes that fill the space between them."""


class Header(NamedTuple):
    height: int
    width: int
    has_exif: bool


def plain_header(data: bytes) -> Header | None:
    """Of a JPEG of one or three colours and eight bits; None for any other."""
    place, size, has_exif, steps = 2, (0, 0), False, 0
    while (steps := steps + 1) <= MAX_STEPS and place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker in _BARE:
            place += 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = place + 4
        if marker in _SIZES:
            if size != (0, 0) or body + 6 > len(data) or data[body] != 8:
                return None
            size = (
                int.from_bytes(data[body + 1 : body + 3], "big"),
                int.from_bytes(data[body + 3 : body + 5], "big"),
            )
            if data[body + 5] not in (1, 3):
                return None
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # a frame that is coded in another way
        elif marker == _APP1 and data[body : body + len(_EXIF)] == _EXIF:
            has_exif = True
        elif marker == _SCAN:
            return Header(*size, has_exif) if all(size) else None
        place += 2 + length
    return None


def decode_plain(data: bytes, header: Header) -> npt.NDArray[np.uint8] | None:
    """u8 [H, W, 3] as stored, of a JPEG with this header; None if anything in it is not as it
    should be. Raises MissingExtraError."""
    out = np.empty((header.height, header.width, 3), np.uint8)
    try:
        _library().decode_jpeg(data, buffer=out)  # refuses more pixels than there is room for
    except ValueError:
        return None
    return out


@lru_cache(maxsize=1)
def has_library() -> bool:
    try:
        _library()
    except MissingExtraError:
        return False
    return True


def _library() -> Any:
    try:
        import simplejpeg
    except ImportError as error:
        raise MissingExtraError.for_library("simplejpeg", "serve") from error
    return simplejpeg
