"""The colours of a decoded frame: which matrix, which range, and how bright.

Works on PyAV's frames without importing it. rgb is u8 [H, W, 3], as on a usual screen (sRGB).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.frames import Rgb

HD_WIDTH, HD_HEIGHT = 1280, 720
"""From here on a picture that names no matrix is BT.709, below BT.601: the rule of players."""
AVCOL_SPC_SMPTE170M = 6
"""BT.601, in a file."""
_UNNAMED = 2
"""`AVCOL_SPC_UNSPECIFIED`."""
_BT709, _BT601, _BT2020 = 1, 5, 9
"""What PyAV's `Colorspace` calls them."""
_PQ, _HLG = 16, 18
"""`AVCOL_TRC_SMPTE2084`, `AVCOL_TRC_ARIB_STD_B67`."""
_WHITE_NITS = 203.0
"""Of a page or a shirt in HDR, https://www.itu.int/pub/R-REP-BT.2408: as bright as SDR gets."""
_BT2020_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
_BT2020_PRIMARIES = (2, 9)
"""And unnamed ones: HDR has no others in practice."""
_STEPS = 4095
"""Of the table that turns light into sRGB."""


def picture_rgb(picture: Any, max_side: int | None = None) -> Rgb:
    """A frame of PyAV as it is stored, not turned; its longer side at most `max_side`.

    Raises PyAV's errors, ValueError.
    """
    size = _size_within(picture.width, picture.height, max_side)
    curve = int(getattr(picture, "color_trc", _UNNAMED))
    is_hdr = curve in (_PQ, _HLG)
    converted = picture.reformat(
        width=size[0],
        height=size[1],
        format="rgb48le" if is_hdr else "rgb24",
        src_colorspace=_matrix_of(picture, is_hdr),
        interpolation="AREA" if size != (picture.width, picture.height) else None,
    )
    stored = np.ascontiguousarray(converted.to_ndarray())
    return _tone_mapped(stored, curve, picture) if is_hdr else stored


def _matrix_of(picture: Any, is_hdr: bool) -> int | None:
    """None: as the frame says."""
    if picture.colorspace != _UNNAMED or picture.format.is_rgb:
        return None
    if is_hdr:
        return _BT2020
    return _BT709 if is_hd(picture.width, picture.height) else _BT601


def is_hd(width: int, height: int) -> bool:
    """Whether a picture that names no matrix is BT.709."""
    return width >= HD_WIDTH or height >= HD_HEIGHT


def _size_within(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    longer = max(width, height)
    if max_side is None or longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))


def _tone_mapped(stored: npt.NDArray[np.uint16], curve: int, picture: Any) -> Rgb:
    """HDR to SDR: white stays white, and what is brighter is white, too."""
    light = _light_of(curve)[stored]
    if picture.color_primaries in _BT2020_PRIMARIES:
        light = light @ _BT2020_TO_709.T
    return _srgb_of_light()[(np.clip(light, 0.0, 1.0) * _STEPS + 0.5).astype(np.uint16)]


@functools.lru_cache(maxsize=2)
def _light_of(curve: int) -> npt.NDArray[np.float32]:
    """Light for each of 65536 values, as a share of white's."""
    value = np.linspace(0.0, 1.0, 1 << 16)
    if curve == _HLG:  # the light of the scene, as https://www.itu.int/rec/R-REC-BT.2100
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)

        def scene(value: Any) -> Any:
            return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)

        return np.asarray(scene(value) / scene(np.float64(0.75)), np.float32)
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = value ** (1 / m2)
    nits = 10000.0 * (np.maximum(power - c1, 0.0) / (c2 - c3 * power)) ** (1 / m1)
    return np.asarray(nits / _WHITE_NITS, np.float32)


@functools.lru_cache(maxsize=1)
def _srgb_of_light() -> npt.NDArray[np.uint8]:
    light = np.linspace(0.0, 1.0, _STEPS + 1)
    bright = 1.055 * light ** (1 / 2.4) - 0.055
    return (np.where(light <= 0.0031308, 12.92 * light, bright) * 255 + 0.5).astype(np.uint8)
