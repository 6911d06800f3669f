"""The JPEG codec both ends of the wire use."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.frames import decode_jpeg, encode_jpeg, shrink_jpeg


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


def test_what_cannot_be_decoded_cannot_be_shrunk() -> None:
    for data in (b"junk", b"\xff\xd8\xff" + bytes(100), noise(100, 100)[:3000]):
        with pytest.raises(FrameDecodeError):
            shrink_jpeg(data, 1)
