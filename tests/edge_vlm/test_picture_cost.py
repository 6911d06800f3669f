"""Pictures whose decoding costs out of proportion are refused by their parts, usual ones not."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.cost import MAX_JUNK, MAX_SCANS, MAX_SEGMENTS, is_cheap, require_bounded
from edge_vlm.pixels.frames import decode_jpeg, decode_picture, encode_jpeg, shrink_jpeg, still_size

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(RGB)
    (image.convert("P") if kind == "GIF" else image).save(buffer, kind, **options)
    return buffer.getvalue()


def with_scans(number: int, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + (between + scan) * (number - data.count(b"\xff\xda")) + data[-2:]


def behind_the_start(what: bytes) -> bytes:
    data = encode_jpeg(RGB)
    return data[:2] + what + data[2:]


def png_chunk(body: bytes, kind: bytes = b"tEXt") -> bytes:
    named = kind + body
    return struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))


def png_with(chunks: bytes) -> bytes:
    data = encoded("PNG")
    return data[:33] + chunks + data[33:]


def gif_with(blocks: bytes) -> bytes:
    data = encoded("GIF")
    place = 13 + (3 << (1 + (data[10] & 7)))
    return data[:place] + blocks + data[place:]


COMMENT = b"\xff\xfe\0\2"
TOO_MUCH = {
    "scans": with_scans(MAX_SCANS + 1),
    "scans and restarts": with_scans(MAX_SCANS + 1, b"\xff\xd0"),
    "scans behind an end in a comment": with_scans(MAX_SCANS + 1, b"\xff\xfe\0\4\xff\xd9"),
    "scans behind junk": with_scans(MAX_SCANS + 1).replace(b"\xff\xdb", b"\0\xff\xdb", 1),
    "segments": behind_the_start(COMMENT * MAX_SEGMENTS),
    "fill": behind_the_start(b"\xff" * MAX_SEGMENTS),
    "junk": behind_the_start(COMMENT + bytes(MAX_JUNK + 1)),
    "stuffed junk": behind_the_start(COMMENT + b"\xff\0" * MAX_SEGMENTS),
    "PNG chunks": png_with(png_chunk(b"") * (MAX_SEGMENTS + 50)),
    "GIF blocks": gif_with(b"\x21\xfe" + b"\1a" * (MAX_SEGMENTS + 1) + b"\0"),
    "PNG data in crumbs": png_with(png_chunk(b"", b"IDAT") * (MAX_SEGMENTS + 50)),
    "PNG chunks behind the picture": encoded("PNG")[:-12] + png_chunk(b"") * (MAX_SEGMENTS + 50),
    "GIF junk": gif_with(b"\1" * (MAX_SEGMENTS + 1)),
    "GIF comments": gif_with(b"\x21\xfe\0" * (MAX_SEGMENTS + 1)),
}
FINE = {
    "many scans": with_scans(MAX_SCANS),
    "what looks like scans in a segment": behind_the_start(
        b"\xff\xfe" + struct.pack(">H", 402) + b"\xff\xda" * 200
    ),
    "what looks like scans behind the end": encoded("JPEG", progressive=True)
    + b"\xff\xda" * 200
    + b"\xff\xd9",
    "a profile in parts": behind_the_start((b"\xff\xe2\x01\x02" + bytes(256)) * 255),
    "PNG chunks": png_with(b"".join(png_chunk(b"a\0b") for _ in range(3))),
    "PNG chunks behind the picture": encoded("PNG")[:-12]
    + png_chunk(b"a\0b") * 9
    + encoded("PNG")[-12:],
    "GIF comment": gif_with(b"\x21\xfe\3abc\0"),
    "WebP": encoded("WEBP"),
}


@pytest.mark.parametrize("data", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_too_many_parts_are_refused_before_anything_is_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the picture was opened")

    monkeypatch.setattr(Image, "open", never)
    for read in (decode_picture, still_size, lambda data: shrink_jpeg(data, 100)):
        with pytest.raises(FrameDecodeError, match="more than"):
            read(data)


@pytest.mark.parametrize("data", FINE.values(), ids=FINE.keys())
def test_usual_pictures_with_many_parts_are_decoded(data: bytes) -> None:
    require_bounded(data)
    assert decode_picture(data).shape == RGB.shape


@pytest.mark.parametrize("size", range(0, 200, 7))
def test_cut_pictures_are_somebody_elses_error(size: int) -> None:
    for data in (*TOO_MUCH.values(), *FINE.values()):
        require_bounded(data[:size])
        is_cheap(data[:size])


def test_what_is_decoded_at_once_is_small_and_usual() -> None:
    assert is_cheap(encode_jpeg(RGB))
    assert is_cheap(encode_jpeg(np.zeros((1080, 1920, 3), np.uint8)))
    assert not is_cheap(encode_jpeg(np.zeros((2160, 3840, 3), np.uint8)))
    assert not is_cheap(encoded("PNG"))
    assert not is_cheap(behind_the_start(COMMENT * 500))
    assert not is_cheap(encode_jpeg(RGB) + bytes(1 << 20))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_large_picture_is_converted_as_a_small_one(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).convert(mode).save(buffer, "JPEG", progressive=True)
    whole = decode_jpeg(buffer.getvalue() + b"\0")
    monkeypatch.setattr("edge_vlm.pixels.frames._decode_usual", lambda data: None)
    monkeypatch.setattr("edge_vlm.pixels.frames.CHEAP_PIXELS", 100)
    monkeypatch.setattr("edge_vlm.pixels.frames.BAND_PIXELS", 7 * RGB.shape[1])
    np.testing.assert_array_equal(decode_jpeg(buffer.getvalue() + b"\0"), whole)
