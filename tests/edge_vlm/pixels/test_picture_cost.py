"""Pictures whose decoding costs out of proportion are refused by their parts, usual ones not."""

from __future__ import annotations

import io
import struct
import subprocess
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.codec.cost import MAX_JUNK, MAX_SCANS, MAX_SEGMENTS, is_cheap, require_bounded
from edge_vlm.pixels.codec.large import decode_elsewhere
from edge_vlm.pixels.frames import (
    decode_jpeg,
    decode_picture,
    decode_still,
    encode_jpeg,
    raw_frame,
    raw_picture,
    shrink_jpeg,
    still_size,
)

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


def large(kind: str, mode: str, **options: Any) -> bytes:
    side = 1040  # just enough of a WebP
    noise = np.random.default_rng(1).integers(0, 256, (side // 40 + 1, side // 40 + 1, 4), np.uint8)
    rgba = np.kron(noise, np.ones((40, 40, 1), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(rgba, "RGBA").convert(mode).save(buffer, kind, method=0, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"), [("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("PNG", "RGBA")]
)
def test_a_large_picture_is_decoded_by_another_process_to_the_same_pixels(
    kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[274] = 6
    options = {"exif": exif.tobytes()} if kind != "GIF" else {}
    data = large(kind, mode, quality=30, **options)
    expected = decode_still(data)
    if kind == "WEBP":
        assert expected.shape[0] * expected.shape[1] > 1_000_000
    else:
        monkeypatch.setattr("edge_vlm.pixels.codec.large._MOST_OTHER", 1_000_000)
    monkeypatch.setattr("edge_vlm.pixels.frames.decode_still", None)
    np.testing.assert_array_equal(decode_picture(data), expected)


def test_a_large_webp_that_is_broken_is_refused_as_here() -> None:
    data = large("WEBP", "RGB", lossless=True)
    for broken in (data[: len(data) // 2], data[:400] + bytes(len(data) - 400)):
        with pytest.raises(FrameDecodeError) as here:
            decode_still(broken)
        with pytest.raises(FrameDecodeError) as elsewhere:
            decode_picture(broken)
        assert elsewhere.value.what == here.value.what


def test_a_decoder_that_dies_or_cannot_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = large("WEBP", "RGB", quality=10)
    monkeypatch.setattr("edge_vlm.pixels.codec.large._CODE", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(FrameDecodeError, match="ended with -9"):
        decode_picture(data)
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(FrameDecodeError, match="no process"):
        decode_picture(data)


def test_a_decoder_is_not_ended_by_who_interrupts_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import os; print(os.getsid(0) == os.getpid())"
    monkeypatch.setattr("edge_vlm.pixels.codec.large._CODE", code)
    with pytest.raises(FrameDecodeError) as ended:  # it says something else than a size
        decode_picture(large("WEBP", "RGB", quality=10))
    assert ended.value.what == "True"


def test_few_large_pictures_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    class Counted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            super().__init__(*args, **options)

        def __exit__(self, *error: Any) -> None:
            nonlocal under_way
            super().__exit__(*error)
            with lock:
                under_way -= 1

    monkeypatch.setattr(subprocess, "Popen", Counted)
    monkeypatch.setattr("edge_vlm.pixels.codec.large._CODE", "")
    with ThreadPoolExecutor(8) as threads:
        ended = [threads.submit(decode_elsewhere, b"") for _ in range(8)]
        for each in ended:
            with pytest.raises(FrameDecodeError, match="ended with 0"):
                each.result(60)
    assert most <= 2
    assert under_way == 0


def test_a_strip_is_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (100_001, 2), "red").save(buffer, "PNG")
    here = decode_picture(buffer.getvalue())
    np.testing.assert_array_equal(decode_picture(raw_frame(here)), here)
    monkeypatch.setattr("edge_vlm.pixels.codec.large._MOST_OTHER", 100_000)
    np.testing.assert_array_equal(decode_picture(buffer.getvalue()), here)


def test_a_raw_frame_is_read_as_it_was() -> None:
    turned = RGB.transpose(1, 0, 2)
    np.testing.assert_array_equal(decode_picture(raw_frame(turned)), turned)
    assert raw_frame(turned) == raw_picture(turned.tobytes(), 40, 60)
