"""What cameras, phones and recorders really give. Each input is made here, of a kind that was
reported publicly; `docs/sources.md` lists them."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_vlm.errors import VideoUnreadable
from edge_vlm.pixels.film.pace import Pace, Skip
from edge_vlm.pixels.film.reading import BEHIND, DECODE_ERROR, MOST_DAMAGED, Video, open_video
from edge_vlm.pixels.film.timeline import LONGEST_GAP_S, Timeline
from edge_vlm.pixels.frames import (
    Rgb,
    decode_jpeg,
    decode_picture,
    encode_jpeg,
    exif_orientation,
    shrink_jpeg,
)
from edge_vlm.pixels.orientation import Orientation
from edge_vlm.pixels.video import probe_video, read_moments, read_video, write_video

PATCHES = np.array(
    [
        [(0, 0, 0), (128, 128, 128), (255, 255, 255), (200, 40, 40)],
        [(40, 180, 40), (40, 40, 200), (230, 140, 30), (140, 60, 160)],
    ],
    np.uint8,
)
CHART: Rgb = PATCHES.repeat(48, axis=0).repeat(48, axis=1)
"""Every corner differs from every other one, and it is not square."""


def patches_of(rgb: Rgb) -> np.ndarray:
    """Colours of eight patches, [2, 4, 3], from their middles."""
    height, width = rgb.shape[:2]
    rows = [height // 4, 3 * height // 4]
    columns = [(2 * i + 1) * width // 8 for i in range(4)]
    return rgb[np.ix_(rows, columns)].astype(int)


def furthest(rgb: Rgb) -> int:
    return int(np.abs(patches_of(rgb) - PATCHES).max())


def only_picture(path: Path) -> Rgb:
    return next(iter(read_video(path, 2.0)))[1]


# ---- orientation -----------------------------------------------------------------------------


def stored_for(number: int) -> Rgb:
    """The chart as a sensor stores it that is held so: Pillow's own turns, undone."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(CHART)
    return np.asarray(image if number == 1 else image.transpose(undo[number]))


def photo(number: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[274] = number
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    if kind == "PNG":
        options = {}
    Image.fromarray(stored_for(number)).save(buffer, kind, exif=exif.tobytes(), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("number", range(1, 9))
def test_a_jpeg_is_turned_as_its_exif_says(number: int) -> None:
    plain = photo(number)
    data = plain[:2] + b"\xff\xfe\x40\x02" + bytes(0x4000) + plain[2:]  # a long comment
    assert furthest(decode_jpeg(data)) <= 6
    small = decode_jpeg(shrink_jpeg(data, len(data) - 1))  # evidence of an alert
    assert small.shape == CHART.shape
    assert furthest(small) <= 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_photo_file_is_turned_as_its_exif_says(tmp_path: Path, number: int, kind: str) -> None:
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(photo(number, kind))
    rgb = only_picture(path)
    assert rgb.shape == CHART.shape
    assert furthest(rgb) <= 6
    (moment,) = read_moments(path, [0.0])  # as training sees it
    assert np.array_equal(moment, rgb)


def test_a_png_may_say_behind_its_samples_how_it_is_turned(tmp_path: Path) -> None:
    data = photo(6, "PNG")
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    late = data[:begin] + data[end:-12] + data[begin:end] + data[-12:]  # IEND is the last
    assert np.array_equal(decode_picture(late), CHART)
    path = tmp_path / "photo.png"
    path.write_bytes(late)
    assert np.array_equal(only_picture(path), CHART)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_says_nothing(exif: bytes) -> None:
    plain = encode_jpeg(CHART)
    data = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    assert exif_orientation(data) is Orientation.UPRIGHT
    assert np.array_equal(decode_jpeg(data), decode_jpeg(plain))


# Where one step right and one step down of the stored picture lead on the screen.
MATRICES = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


def matrix_of(number: int, size: tuple[int, int] = (0, 0)) -> list[int]:
    (a, b), (c, d) = MATRICES[number]
    one = 1 << 16
    return [a * one, b * one, 0, c * one, d * one, 0, size[0] * one, size[1] * one, 1 << 30]


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_film_is_turned_as_its_display_matrix_says(
    tmp_path: Path, number: int, suffix: str
) -> None:
    path = tmp_path / f"phone.{suffix}"
    film(path, [stored_for(number)] * 3)
    data = path.read_bytes()
    place = data.index(b"tkhd") + 44  # after version, times, track, duration, layer and volume
    upright = np.array(matrix_of(1), ">i4").tobytes()
    assert data[place : place + 36] == upright
    turned = np.array(matrix_of(number, (960, 960)), ">i4").tobytes()
    path.write_bytes(data[:place] + turned + data[place + 36 :])
    rgb = only_picture(path)
    assert rgb.shape == CHART.shape
    assert furthest(rgb) <= 6
    (moment,) = read_moments(path, [0.0])
    assert np.array_equal(moment, rgb)


@given(st.sampled_from(range(1, 9)), st.integers(1, 7), st.integers(1, 7))
def test_orientations_of_matrices_and_of_exif_are_the_same(
    number: int, height: int, width: int
) -> None:
    stored = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    orientation = Orientation.of_matrix(matrix_of(number))
    assert orientation is Orientation.of_exif(number)
    turned = orientation.turn(stored)
    assert turned.shape[:2] == ((width, height) if orientation.swaps_sides else (height, width))
    # Pixel by pixel, as the matrix is meant.
    (a, b), (c, d) = MATRICES[number]
    for y in range(height):
        for x in range(width):
            to_x = (a * x + c * y) + (width if c == 0 else height) * ((a + c) < 0) - ((a + c) < 0)
            to_y = (b * x + d * y) + (height if b == 0 else width) * ((b + d) < 0) - ((b + d) < 0)
            assert np.array_equal(turned[to_y, to_x], stored[y, x])


# ---- colours ---------------------------------------------------------------------------------

TO_YUV = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
SPACES = {"601": 6, "709": 1, "2020": 9, None: 2}


def yuv_of(rgb: np.ndarray, matrix: str, is_full: bool, depth: int) -> list[np.ndarray]:
    """By the standards' own formulas: rgb f64 [H, W, 3] in 0..1 -> three planes."""
    red, blue = TO_YUV[matrix]
    luma = rgb @ [red, 1 - red - blue, blue]
    cb = (rgb[..., 2] - luma) / (2 - 2 * blue)
    cr = (rgb[..., 0] - luma) / (2 - 2 * red)
    top = (1 << depth) - 1
    scale = 1 << (depth - 8)
    if is_full:
        planes = [luma * top, cb * top + 128 * scale, cr * top + 128 * scale]
    else:
        planes = [
            (16 + 219 * luma) * scale,
            (128 + 224 * cb) * scale,
            (128 + 224 * cr) * scale,
        ]
    return [
        plane.round().clip(0, top).astype(np.uint8 if depth == 8 else "<u2") for plane in planes
    ]


def coloured(
    path: Path,
    rgb: np.ndarray,
    matrix: str,
    *,
    is_full: bool = False,
    depth: int = 8,
    tagged: bool = True,
    curve: int = 2,
    primaries: int = 2,
) -> Path:
    """A lossless file (FFV1) of one picture, rgb f64 [H, W, 3] in 0..1."""
    planes = yuv_of(rgb, matrix, is_full, depth)
    kind = "yuv444p" if depth == 8 else f"yuv444p{depth}le"
    picture = av.VideoFrame(rgb.shape[1], rgb.shape[0], kind)
    for plane, values in zip(picture.planes, planes, strict=True):
        row = values.astype(np.uint8 if depth == 8 else "<u2").tobytes()
        step = plane.line_size
        width = len(row) // rgb.shape[0]
        buffer = bytearray(plane.buffer_size)
        for y in range(rgb.shape[0]):
            buffer[y * step : y * step + width] = row[y * width : (y + 1) * width]
        plane.update(bytes(buffer))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = rgb.shape[1], rgb.shape[0], kind
        context = stream.codec_context
        if tagged:
            context.colorspace = SPACES[matrix]
            context.color_range = 2 if is_full else 1
        context.color_trc, context.color_primaries = curve, primaries
        picture.pts, picture.time_base = 0, Fraction(1, 2)
        picture.colorspace = SPACES[matrix] if tagged else 2
        picture.color_range = (2 if is_full else 1) if tagged else 0
        picture.color_trc, picture.color_primaries = curve, primaries
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("matrix", TO_YUV)
def test_a_tagged_chart_has_its_colours(
    tmp_path: Path, matrix: str, is_full: bool, depth: int
) -> None:
    path = coloured(tmp_path / "a.mkv", CHART / 255, matrix, is_full=is_full, depth=depth)
    assert furthest(only_picture(path)) <= 3


@pytest.mark.parametrize(
    ("matrix", "size"), [("601", (640, 480)), ("709", (1280, 720)), ("709", (720, 1280))]
)
def test_a_chart_without_tags_is_read_by_its_size(
    tmp_path: Path, matrix: str, size: tuple[int, int]
) -> None:
    large = PATCHES.repeat(size[1] // 2, axis=0).repeat(size[0] // 4, axis=1) / 255
    path = coloured(tmp_path / "a.mkv", large, matrix, tagged=False)
    assert furthest(only_picture(path)) <= 3


def hdr(curve: int) -> np.ndarray:
    """The chart in HDR with white at 203 cd/m2, f64 [H, W, 3] in 0..1 (BT.2100, BT.2408)."""
    value = CHART / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    light = (
        light
        @ np.linalg.inv(
            [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
        ).T
    )
    if curve == 18:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        scene = light * (np.exp((0.75 - c) / a) + b) / 12
        low, high = np.sqrt(3 * scene.clip(0)), a * np.log((12 * scene - b).clip(1e-9)) + c
        return np.asarray(np.where(scene <= 1 / 12, low, high))
    power = (light.clip(0) * 203 / 10000) ** (2610 / 16384)
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    return np.asarray(((c1 + c2 * power) / (1 + c3 * power)) ** (2523 / 4096 * 128))


@pytest.mark.parametrize("curve", [16, 18], ids=["PQ", "HLG"])
def test_hdr_is_shown_as_a_usual_screen_does(tmp_path: Path, curve: int) -> None:
    path = coloured(tmp_path / "a.mkv", hdr(curve), "2020", depth=10, curve=curve, primaries=9)
    assert furthest(only_picture(path)) <= 8


def test_a_large_picture_is_scaled_where_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, CHART.repeat(10, axis=0).repeat(10, axis=1)[None], 2)
    video = open_video(path)
    (frame,) = video.frames()
    assert frame.rgb(640).shape == (320, 640, 3)
    assert furthest(frame.rgb(640)) <= 6
    assert frame.rgb().shape == (960, 1920, 3)
    video.close()


# ---- tracks ----------------------------------------------------------------------------------


def film(
    path: Path,
    pictures: list[Rgb],
    *,
    codec: str = "libx264",
    rate: int = 2,
    times_ms: list[int] | None = None,
    options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"crf": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj444p" if codec == "mjpeg" else "yuv420p"
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def grey(level: int, side: int = 64) -> Rgb:
    return np.full((side, side, 3), level, np.uint8)


def greys(count: int) -> list[Rgb]:
    """Each ten levels brighter than the one before."""
    return [grey(20 + 10 * i) for i in range(count)]


def levels(pictures: Iterator[tuple[float, Rgb]]) -> list[tuple[float, int]]:
    return [(time_s, round((float(rgb.mean()) - 20) / 10)) for time_s, rgb in pictures]


def two_tracks(path: Path, sides: tuple[int, int], marks: tuple[int, int]) -> Path:
    """A track of dark and one of bright pictures. `marks`: their dispositions."""
    with av.open(str(path), "w") as container:
        streams = []
        for side, mark in zip(sides, marks, strict=True):
            stream = container.add_stream("mjpeg", rate=2)
            stream.width = stream.height = side
            stream.pix_fmt = "yuvj420p"
            stream.disposition = mark
            streams.append(stream)
        for _ in range(4):
            for stream, side, level in zip(streams, sides, (40, 200), strict=True):
                frame = av.VideoFrame.from_ndarray(grey(level, side), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("sides", "marks", "is_second"),
    [
        ((64, 128), (0, 1), True),
        ((128, 64), (0, 1), True),
        ((64, 128), (0, 0), True),
        ((128, 64), (0, 0), False),
        ((64, 64), (0, 0), False),
        ((128, 64), (1, 0), False),
    ],
)
def test_the_default_track_is_watched_and_then_the_largest(
    tmp_path: Path, sides: tuple[int, int], marks: tuple[int, int], is_second: bool
) -> None:
    path = two_tracks(tmp_path / "a.mkv", sides, marks)
    assert (only_picture(path).mean() > 100) == is_second
    (moment,) = read_moments(path, [0.0])
    assert (moment.mean() > 100) == is_second


def test_a_cover_is_no_film(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = 0x400
        picture = av.VideoFrame.from_ndarray(grey(90), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        for _ in range(20):
            samples = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            samples.rate = 44100
            container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    with pytest.raises(VideoUnreadable, match="there is no video in it"):
        list(read_video(path, 2.0))
    with pytest.raises(VideoUnreadable, match="there is no video in it"):
        probe_video(path)


# ---- time ------------------------------------------------------------------------------------

WHOLE = [(0.5 * i, i) for i in range(16)]


def joined(tmp_path: Path, *pieces: Path) -> Path:
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return path


def two_recordings(tmp_path: Path) -> Path:
    first = film(tmp_path / "1.ts", greys(16)[:8])
    return joined(tmp_path, first, film(tmp_path / "2.ts", greys(16)[8:]))


def jumps_ahead(hours: float) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        first = film(tmp_path / "1.ts", greys(16)[:8])
        times = [round(hours * 3_600_000) + 500 * i for i in range(8)]
        return joined(tmp_path, first, film(tmp_path / "2.ts", greys(16)[8:], times_ms=times))

    return make


def wild(suffix: str, wild_at: int) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        times = [500 * i for i in range(16)]
        for number in range(wild_at, 16 if wild_at == 15 else wild_at + 1):
            times[number] += 4_000_000_000
        return remuxed(tmp_path, suffix, times)

    return make


def remuxed(tmp_path: Path, suffix: str, times_ms: list[int]) -> Path:
    """The packets of a film of key pictures, with other times."""
    whole = film(tmp_path / "whole.mkv", greys(16), options={"g": "1", "crf": "4"})
    path = tmp_path / f"wild.{suffix}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, 1000)
        for packet, time_ms in zip(source.demux(video=0), times_ms, strict=False):
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = time_ms
            target.mux(packet)
    return path


CLOCKS = {
    "two recordings": two_recordings,
    "25 hours ahead": jumps_ahead(25),
    "61 s ahead": jumps_ahead(65 / 3600 + 4 / 3600),
    "a wild last time": wild("mkv", 15),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_that_jumps_goes_on_from_its_last_end(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = CLOCKS[name](tmp_path)
    assert levels(read_video(path, 2.0)) == WHOLE
    said = [record for record in caplog.records if "clock jumps" in record.message]
    assert len(said) == 1
    probed = probe_video(path)
    assert probed.end_s == pytest.approx(7.5, abs=2e-3)
    assert len(probed.starts_s) == 16
    moments = zip(probed.starts_s, read_moments(path, probed.starts_s.tolist()), strict=True)
    assert [number for _, number in levels(iter(moments))] == list(range(16))


def test_a_long_gap_is_a_gap(tmp_path: Path) -> None:
    times = [500 * i + (55_000 if i >= 8 else 0) for i in range(16)]
    path = film(tmp_path / "a.mkv", greys(16), times_ms=times)
    assert [time_s for time_s, _ in read_video(path, 2.0)] == pytest.approx(
        [time_ms / 1000 for time_ms in times], abs=0.5
    )


@given(
    st.lists(
        st.one_of(st.floats(0.001, 5.0), st.sampled_from([-1e9, -3.0, 61.0, 9e4, 5e9])),
        min_size=1,
        max_size=60,
    )
)
def test_a_timeline_never_goes_back_nor_far_ahead(steps: list[float]) -> None:
    timeline = Timeline(0.04)
    clock_s, last_s = 1000.0, 0.0
    assert timeline.place(clock_s, 0.04) == 0.0
    for step in steps:
        clock_s += step
        time_s = timeline.place(clock_s)
        assert last_s <= time_s <= last_s + LONGEST_GAP_S + 6.0
        last_s = time_s


def test_one_wild_time_costs_no_time() -> None:
    timeline = Timeline(0.5)
    times = [0.0, 0.5, 1.0, 5e9, 2.0, 2.5, 0.0, 3.5, 4.0]
    assert [timeline.place(t) for t in times] == pytest.approx([0.5 * i for i in range(9)])


def mid_gop(tmp_path: Path) -> Path:
    """The second half of a group of pictures and a whole one."""
    whole = film(tmp_path / "a.ts", greys(24), rate=4, options={"g": "12", "bf": "2", "crf": "4"})
    path = tmp_path / "b.ts"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= 6:
                packet.stream = stream
                target.mux(packet)
    return path


def test_a_stream_that_begins_within_a_group_of_pictures_is_whole(tmp_path: Path) -> None:
    path = mid_gop(tmp_path)
    seen = levels(read_video(path, 4.0))
    assert seen == [(0.25 * i, 12 + i) for i in range(12)]
    probed = probe_video(path)
    assert len(probed.starts_s) == 12
    assert levels(zip([0.0, 2.0], read_moments(path, [0.0, 2.0]), strict=True)) == [
        (0.0, 12),
        (2.0, 20),
    ]


@pytest.mark.parametrize("suffix", ["mkv", "webm", "flv", "mp4", "ts"])
def test_sound_may_outlast_the_film(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        codec = {"webm": "libvpx"}.get(suffix, "libx264")
        stream = container.add_stream(codec, rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        rate = 48000 if suffix == "webm" else 44100
        sound = container.add_stream("libopus" if suffix == "webm" else "aac", rate=rate)
        for picture in greys(16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
        silence = np.zeros((1, 960 if suffix == "webm" else 1024), np.float32)
        for _ in range(12 * rate // silence.shape[1]):
            samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            samples.rate = rate
            container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    assert [time_s for time_s, _ in read_video(path, 2.0)] == [0.5 * i for i in range(16)]
    assert probe_video(path).end_s == pytest.approx(7.5, abs=0.01)


def test_the_last_picture_of_a_file_that_is_cut_off_is_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(16)]
    options = {"g": "4", "bf": "2", "crf": "4"}
    whole = film(tmp_path / "a.mkv", noise, options=options).read_bytes()
    path = tmp_path / "b.mkv"
    path.write_bytes(whole[: len(whole) * 5 // 8])
    seen = []
    with pytest.raises(VideoUnreadable, match=r"cut off.* after (\d\.\d) .*8\.0 s") as caught:
        for time_s, _ in read_video(path, 2.0):
            seen.append(time_s)
    end_s = float(caught.value.what.split("after ")[1].split(" ")[0])
    assert seen == [0.5 * i for i in range(len(seen))]
    assert seen[-1] == pytest.approx(end_s - 0.5)


def test_a_stream_without_times_says_that_it_assumes_a_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = film(tmp_path / "a.mjpeg", greys(16), codec="mjpeg", options={}, format="mjpeg")
    list(read_video(path, 2.0))
    assert "no times in it: 25 pictures a second are assumed" in caplog.text


# ---- damage ----------------------------------------------------------------------------------


def damaged(
    tmp_path: Path,
    suffix: str,
    codec: str,
    bad: set[int],
    count: int = 16,
    options: dict[str, str] | None = None,
) -> Path:
    """A film, of key pictures without `options`, some of whose packets are zeros."""
    pictures = [grey(20 + 10 * (i % 20)) for i in range(count)]
    options = options or {}
    whole = film(tmp_path / f"whole.{suffix}", pictures, codec=codec, options=options)
    path = tmp_path / f"damaged.{suffix}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            given = packet
            if number in bad:
                given = av.Packet(bytes(packet.size))
                given.pts, given.dts, given.time_base = packet.pts, packet.dts, packet.time_base
                given.duration, given.is_keyframe = packet.duration, packet.is_keyframe
            given.stream = stream
            target.mux(given)
    return path


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mov"])
@pytest.mark.parametrize("bad", [{0}, {6}, {15}, {0, 7, 15}, {3, 4, 5}])
def test_a_damaged_picture_is_counted_and_passed_over(
    tmp_path: Path, suffix: str, bad: set[int]
) -> None:
    path = damaged(tmp_path, suffix, "mjpeg", bad)
    video = open_video(path)
    frames = list(video.frames())
    assert [round(frame.time_s * 2) for frame in frames] == sorted(set(range(16)) - bad)
    assert video.counts[DECODE_ERROR] == len(bad)
    video.close()
    assert len(probe_video(path).starts_s) == 16  # `data check` takes it, too
    assert len(list(read_moments(path, [0.5 * i for i in range(16)]))) == 16


@pytest.mark.parametrize("bad", [{15}, {14}, {13, 15}, {9}])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_damage_takes_no_neighbours_along(tmp_path: Path, suffix: str, bad: set[int]) -> None:
    """Where several threads decode, an error near the end hides pictures that are whole."""
    options = {"g": "100", "bf": "0", "crf": "4"}
    path = damaged(tmp_path, suffix, "libx264", bad, options=options)
    video = open_video(path)
    frames = list(video.frames())
    assert [round(frame.time_s * 2) for frame in frames] == sorted(set(range(16)) - bad)
    assert video.counts[DECODE_ERROR] == len(bad)
    video.close()


def test_many_damaged_pictures_in_a_row_are_a_broken_video(tmp_path: Path) -> None:
    bad = set(range(5, 5 + MOST_DAMAGED))
    path = damaged(tmp_path, "avi", "mjpeg", bad, count=60)
    with pytest.raises(VideoUnreadable, match=f"{MOST_DAMAGED} pictures in a row"):
        list(read_video(path, 2.0))
    path = damaged(tmp_path, "avi", "mjpeg", bad - {20}, count=60)
    assert len(list(read_video(path, 2.0))) == 60 - MOST_DAMAGED + 1


def test_a_film_of_damage_alone_names_its_codec(tmp_path: Path) -> None:
    path = damaged(tmp_path, "avi", "mjpeg", set(range(16)))
    with pytest.raises(VideoUnreadable, match="none of its pictures can be decoded, as mjpeg"):
        list(read_video(path, 2.0))


def test_a_codec_that_nobody_decodes_is_named(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", greys(4))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz9"))
    for _ in range(2):
        with pytest.raises(VideoUnreadable, match="its codec is zzz9"):
            open_video(path)


def test_what_is_skipped_is_counted_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Decoding goes on with a key picture, and nothing shown builds upon what was left out."""
    options = {"g": "8", "bf": "0", "crf": "4"}
    path = film(tmp_path / "a.mkv", greys(24)[:22], options=options)

    def takes(self: Pace, camera_s: float, is_key: bool, now_s: float, waited_s: float) -> bool:
        number = round(camera_s * 2)
        self.skip = Skip.TO_KEY if number in (3, 4, 12) else Skip.NOTHING
        self._promptest_s = 1000.0
        return self._is_taken(camera_s, is_key)

    monkeypatch.setattr(Pace, "takes", takes)
    video = Video(str(path), "cam", is_live=True)
    frames = list(video.decoded())
    video.close()
    shown = [0, 1, 2, 8, 9, 10, 11, 16, 17, 18, 19, 20, 21]
    assert [number for _, number in levels((f.time_s, f.rgb()) for f in frames)] == shown
    assert [frame.captured_s for frame in frames] == [1000.0 + n / 2 for n in shown]
    assert video.counts[BEHIND] == 22 - len(shown)
    assert caplog.text.count("decoding is slower than the camera") == 1


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["12:30:00.mp4", "http:clip.mp4", "a #1?x=%20.mp4", "-clip.mp4"])
def test_a_file_may_have_any_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "a.mp4", greys(4)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), Path(".", name), tmp_path / name):
        assert len(list(read_video(path, 2.0))) == 4


logging.getLogger("libav").setLevel(logging.CRITICAL)
