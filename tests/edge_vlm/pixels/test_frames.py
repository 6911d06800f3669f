"""The JPEG codec both ends of the wire use."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.codec.jpeg import Header, decode_plain, plain_header
from edge_vlm.pixels.frames import decode_jpeg, encode_jpeg, raw_frame, shrink_jpeg


def noise(height: int, width: int) -> bytes:
    """Hard to compress: no real picture is larger for its size."""
    rng = np.random.default_rng(height * width)
    return encode_jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_that_fits_is_left_as_it_is() -> None:
    data = noise(40, 60)
    assert shrink_jpeg(data, len(data)) is data


@pytest.mark.parametrize(("height", "width"), [(700, 1500), (2400, 100), (64, 64)])
def test_a_picture_that_does_not_fit_keeps_its_shape(height: int, width: int) -> None:
    limit = 8000
    small = shrink_jpeg(noise(height, width), limit)
    assert len(small) <= limit
    rgb = decode_jpeg(small)
    assert max(rgb.shape) <= max(height, width)
    assert rgb.shape[0] / rgb.shape[1] == pytest.approx(height / width, rel=0.5)


@pytest.mark.parametrize("shape", [(2, 65_501, 3), (65_501, 2, 3)])
def test_a_strip_longer_than_any_jpeg_becomes_one(shape: tuple[int, int, int]) -> None:
    rgb = decode_jpeg(shrink_jpeg(raw_frame(np.full(shape, 90, np.uint8)), 1 << 20))
    assert abs(rgb.astype(int) - 90).max() <= 1


def test_what_cannot_be_decoded_cannot_be_shrunk() -> None:
    for data in (b"junk", b"\xff\xd8\xff" + bytes(100), noise(100, 100)[:3000]):
        with pytest.raises(FrameDecodeError):
            shrink_jpeg(data, 1)


def chart(subsampling: int, progressive: bool = False) -> bytes:
    """A picture with something in every row."""
    rows, columns = np.mgrid[0:480, 0:640]
    rgb = np.stack([rows % 256, columns % 256, (rows * columns) % 199], axis=2).astype(np.uint8)
    data = io.BytesIO()
    picture = Image.fromarray(rgb)
    picture.save(data, "JPEG", quality=85, subsampling=subsampling, progressive=progressive)
    return data.getvalue()


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_picture_without_its_end_marker_is_whole(subsampling: int, cut: int) -> None:
    data = chart(subsampling)
    assert data.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(decode_jpeg(data[:-cut]), decode_jpeg(data))
    assert len(shrink_jpeg(data[:-cut], 5000)) <= 5000


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("cut", [10, 20, 100])
def test_the_last_row_of_blocks_may_suffer(subsampling: int, cut: int) -> None:
    data = chart(subsampling)
    wrong = (decode_jpeg(data[:-cut]) != decode_jpeg(data)).any(axis=(1, 2))
    assert wrong.any()
    assert not wrong[:-17].any()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_picture_that_lacks_more_is_refused(share: float, progressive: bool) -> None:
    data = chart(2, progressive)
    with pytest.raises(FrameDecodeError, match="missing"):
        decode_jpeg(data[: int(len(data) * (1 - share))])


def test_in_a_small_picture_the_last_row_of_blocks_is_too_much() -> None:
    data = noise(32, 32)
    np.testing.assert_array_equal(decode_jpeg(data[:-2]), decode_jpeg(data))
    with pytest.raises(FrameDecodeError, match="8 of 32 rows are missing"):
        decode_jpeg(data[:-100])


SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:1:1")


def saved(picture: Image.Image, **options: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", **options)
    return data.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (241, 319)])
@pytest.mark.parametrize("progressive", [False, True])
def test_usual_pictures_have_the_pixels_that_pillow_gives(
    size: tuple[int, int], progressive: bool
) -> None:
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(size[0])
    picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    files = [saved(picture, subsampling=kind, progressive=progressive) for kind in SUBSAMPLINGS]
    files += [saved(picture.convert("L"), progressive=progressive), saved(picture, comment=b"x")]
    files += [saved(picture, restart_marker_rows=1), saved(picture, icc_profile=bytes(70_000))]
    for data in files:
        header = plain_header(data)
        assert header == (*size, False)
        np.testing.assert_array_equal(decode_plain(data, header), by_pillow(data))
        np.testing.assert_array_equal(decode_jpeg(data), by_pillow(data))


def test_unusual_pictures_are_left_to_pillow() -> None:
    picture = Image.fromarray(np.zeros((16, 24, 3), np.uint8))
    cmyk = saved(picture.convert("CMYK"))
    assert plain_header(cmyk) is None
    np.testing.assert_array_equal(decode_jpeg(cmyk), by_pillow(cmyk))
    usual = saved(picture)
    place = usual.index(b"\xff\xc0")
    for other in (b"\xff\xc3", b"\xff\xc9"):  # without loss; coded arithmetically
        assert plain_header(usual.replace(b"\xff\xc0", other)) is None
    assert plain_header(usual[: place + 4]) is None
    twelve_bits = usual[: place + 4] + b"\x0c" + usual[place + 5 :]
    assert plain_header(twelve_bits) is None


def test_a_header_that_lies_is_not_believed() -> None:
    pytest.importorskip("simplejpeg")
    data = chart(2)
    assert decode_plain(data, Header(16, 16, False)) is None  # as a second, larger frame would be
    rubbish = bytearray(data)
    rubbish[-2000:-1000] = bytes(range(250)) * 4
    assert decode_plain(bytes(rubbish), Header(480, 640, False)) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_on_its_side_is_turned_either_way(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    rng = np.random.default_rng(orientation)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    data = saved(picture, exif=exif.tobytes())
    rgb = decode_jpeg(data)
    monkeypatch.setattr("edge_vlm.pixels.frames.has_library", lambda: False)
    np.testing.assert_array_equal(rgb, decode_jpeg(data))
