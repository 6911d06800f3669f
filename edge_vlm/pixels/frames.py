"""One decoded picture, and the JPEG codec both ends of the wire use.

Pillow is imported here and nowhere else in this package. rgb is always u8 [H, W, 3].
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import FrameDecodeError, MissingExtraError
from edge_vlm.pixels.codec.cost import CHEAP_PIXELS, require_bounded
from edge_vlm.pixels.codec.jpeg import decode_plain, has_library, plain_header
from edge_vlm.pixels.codec.large import decode_elsewhere, is_large
from edge_vlm.pixels.orientation import Orientation

if TYPE_CHECKING:
    from types import ModuleType

Rgb = npt.NDArray[np.uint8]
"""A picture, [H, W, 3]."""
JPEG_MAGIC = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
MISSING_ROWS, MISSING_SHARE = 17, 0.1
"""What may be missing of a picture without end marker: one row of blocks and the pixels above it
that its colours reach, and no more than this share of the picture."""
MADE_UP = bytes(range(1, 255)) * 4
STILL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_BEGINS = (JPEG_MAGIC, b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
RAW_HEADER = re.compile(rb"P6\n(\d{1,8}) (\d{1,8})\n255\n")
"""Of a binary PPM, https://netpbm.sourceforge.net/doc/ppm.html, in its plainest form."""
MAX_JPEG_SIDE = 65_500
"""Of the encoder."""
MAX_PIXELS = 64_000_000
"""A larger picture is refused before it is decompressed (a small file can claim any size)."""
BAND_PIXELS = 1 << 18
ORIENTATION_TAG = 274
EXIF_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF")
"""Of JPEG, PNG and WebP."""
SHRINK_SIDES = (1920, 1280, 960, 640, 480, 320, 160, 64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One decoded picture.

    `rgb` u8 [H, W, 3]; `pts_ns` capture time in nanoseconds from the start of its stream; `seq` the
    number its sender gave it.
    """

    rgb: np.ndarray
    pts_ns: int
    seq: int

    def __post_init__(self) -> None:
        require_rgb(self.rgb)


def require_rgb(rgb: np.ndarray) -> None:
    """Raises ValueError saying what else it is than u8 [H, W, 3] with at least one pixel."""
    if not isinstance(rgb, np.ndarray):
        raise ValueError(f"rgb must be an array, u8 [H, W, 3], got {type(rgb).__name__}")
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb must be u8 [H, W, 3], got {rgb.dtype} {list(rgb.shape)}")
    if rgb.shape[0] == 0 or rgb.shape[1] == 0:
        raise ValueError("rgb must have at least one row and one column")


def _pillow_image() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.for_library("Pillow", "client") from error
    return Image


def decode_jpeg(data: bytes) -> np.ndarray:
    """JPEG bytes -> rgb u8 [H, W, 3], turned as its EXIF says.

    Many cameras leave the end marker out: such a picture is taken if nothing else is missing, or so
    little that at most MISSING_ROWS rows at the bottom suffer. Raises FrameDecodeError when more
    is, when the bytes are no JPEG, claim more than MAX_PIXELS, or are in more parts than
    `require_bounded` allows.
    """
    image_module = _pillow_image()
    if data[:3] != JPEG_MAGIC:
        raise FrameDecodeError(
            "the picture is not a JPEG", where=f"{len(data)} bytes, starting {data[:4].hex()!r}"
        )
    require_bounded(data)
    rgb = _decode_usual(data)
    if rgb is not None:
        return rgb
    try:
        whole = _ended(data, image_module)
        with image_module.open(io.BytesIO(whole), formats=["JPEG"]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise FrameDecodeError(
                    f"the picture is too large: {width}x{height}",
                    remedy=f"send at most {MAX_PIXELS} pixels",
                )
            orientation = _orientation_of(image)
            return orientation.turn(_rgb_of(image))
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise FrameDecodeError(
            f"the JPEG is broken or cut off: {error}", where=f"{len(data)} bytes"
        ) from error


def _rgb_of(image: Any) -> Rgb:
    """rgb u8 [H, W, 3] as stored. Pillow keeps every other thread of the process waiting while it
    converts, so a large picture is converted in bands."""
    width, height = image.size
    if width * height <= CHEAP_PIXELS:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
    image.load()
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        out[top:bottom] = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"))
    return out


def _decode_usual(data: bytes) -> Rgb | None:
    """As `decode_jpeg`, of a JPEG with nothing unusual about it; None for any other, and where
    simplejpeg is not installed: Pillow gives the same pixels."""
    header = plain_header(data) if data.endswith(JPEG_END) and has_library() else None
    if header is None or header.height * header.width > MAX_PIXELS:
        return None
    rgb = decode_plain(data, header)
    if rgb is None or not header.has_exif:
        return rgb
    return exif_orientation(data).turn(rgb)


def _ended(data: bytes, image_module: ModuleType) -> bytes:
    """The JPEG with an end marker. Raises OSError when more than a little is missing before it.

    A decoder makes up what is missing from whatever follows. So the picture is decoded with two
    different endings: the rows that differ were not in the data.
    """
    if data.rstrip(b"\0").endswith(JPEG_END):
        return data
    data = data.removesuffix(JPEG_END[:1])  # half of one
    planes = []
    for made_up in (b"", MADE_UP):
        with image_module.open(io.BytesIO(data + made_up + JPEG_END), formats=["JPEG"]) as image:
            if image.size[0] * image.size[1] > MAX_PIXELS:
                return data
            if image.info.get("progressive"):
                raise OSError("the end of a progressive one is missing")  # whole scans may be
            image.draft("L", image.size)
            planes.append(np.asarray(image.convert("L")))
    height = len(planes[0])
    missing = height - int((planes[0] == planes[1]).all(axis=1).cumprod().sum())
    if missing > min(MISSING_ROWS, MISSING_SHARE * height):
        raise OSError(f"{missing} of {height} rows are missing")
    return data + JPEG_END


def exif_orientation(data: Any) -> Orientation:
    """What a compressed picture (JPEG, PNG, WebP), as bytes or a buffer, says about itself."""
    data = bytes(data)
    if not any(mark in data for mark in EXIF_MARKS):
        return Orientation.UPRIGHT
    image_module = _pillow_image()
    try:
        with image_module.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            return _orientation_of(image)
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError):
        return Orientation.UPRIGHT  # not one of these: whoever decodes it says so


def _orientation_of(image: Any) -> Orientation:
    if image.format == "PNG":
        image.load()  # it may stand behind the samples
    if "exif" not in image.info:
        return Orientation.UPRIGHT
    try:
        return Orientation.of_exif(image.getexif().get(ORIENTATION_TAG))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return Orientation.UPRIGHT  # EXIF that is damaged says nothing


def samples_of(rgb: np.ndarray) -> memoryview:
    """The bytes of rgb u8 [H, W, 3], row by row; not copied where they lie like that."""
    return np.ascontiguousarray(rgb).reshape(-1).data


def raw_frame(rgb: np.ndarray) -> bytes:
    """rgb u8 [H, W, 3] as `raw_picture`, of its samples."""
    height, width = rgb.shape[:2]
    _require_samples(rgb.size, width, height)
    rows = max(1, BAND_PIXELS // width)
    # Other threads go on only while bytes are joined, not while an array is copied to them.
    bands = [rgb[top : top + rows].tobytes() for top in range(0, height, rows)]
    return b"".join([b"P6\n%d %d\n255\n" % (width, height), *bands])


def raw_picture(samples: bytes | memoryview, width: int, height: int) -> bytes:
    """u8 RGB samples, row by row, as a binary PPM.

    Raises FrameDecodeError when there are not as many as width and height say, or none.
    """
    _require_samples(len(samples), width, height)
    return b"P6\n%d %d\n255\n" % (width, height) + samples


def _require_samples(number: int, width: int, height: int) -> None:
    if number != 3 * width * height or number == 0:
        raise FrameDecodeError(
            f"a raw picture of {width}x{height} has {3 * width * height} bytes, not {number}"
        )


def decode_picture(data: bytes) -> np.ndarray:
    """A JPEG, PNG, WebP or GIF, or what `raw_picture` returned -> rgb u8 [H, W, 3].

    What can be seen through is laid on white, of an animation the first picture is taken. Raises
    FrameDecodeError.
    """
    if data[:3] == JPEG_MAGIC:
        return decode_jpeg(data)
    header = RAW_HEADER.match(data)
    if header is None:
        width, height = still_size(data)
        if is_large(data, width * height):
            return decode_elsewhere(data)
        return decode_still(data)
    width, height = int(header[1]), int(header[2])
    _require_samples(len(data) - header.end(), width, height)
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3)


def still_size(data: bytes) -> tuple[int, int]:
    """Width and height that a JPEG, PNG, WebP or GIF announces; nothing is decompressed.

    Raises FrameDecodeError for anything else, for more than MAX_PIXELS, and as `require_bounded`.
    """
    require_bounded(data)
    image_module = _pillow_image()
    try:
        with image_module.open(io.BytesIO(data), formats=STILL_FORMATS) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        is_one = data.startswith(_BEGINS) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
        raise FrameDecodeError(
            "the picture is broken or cut off"
            if is_one
            else "not a JPEG, PNG, WebP or GIF picture",
            where=f"{len(data)} bytes, starting {data[:4].hex()!r}",
        ) from error
    if width * height > MAX_PIXELS:
        raise FrameDecodeError(
            f"the picture is too large: {width}x{height}",
            remedy=f"send at most {MAX_PIXELS} pixels",
        )
    return width, height


def decode_still(data: bytes) -> np.ndarray:
    """A JPEG, PNG, WebP or GIF as `decode_picture`, all of it in this process."""
    still_size(data)
    image_module = _pillow_image()
    try:
        with image_module.open(io.BytesIO(data), formats=STILL_FORMATS) as image:
            orientation = _orientation_of(image)
            if image.mode.startswith("I"):
                picture = _of_deep_grey(image, image_module)
            elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                top = image.convert("RGBA")
                picture = image_module.new("RGBA", top.size, "white")
                picture.alpha_composite(top)
            else:
                picture = image
            return orientation.turn(_rgb_of(picture))
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise FrameDecodeError(
            f"the picture is broken or cut off: {error}", where=f"{len(data)} bytes"
        ) from error


def _of_deep_grey(image: Any, image_module: ModuleType) -> Any:
    """A grey PNG of 16 bits, with 8: Pillow would make white of all above 255."""
    deep = np.asarray(image)
    grey = (deep >> 8).astype(np.uint8)
    grey[deep == image.info.get("transparency", -1)] = 255
    return image_module.fromarray(grey)


def encode_jpeg(rgb: np.ndarray, quality: int = 92) -> bytes:
    """rgb u8 [H, W, 3] -> JPEG bytes.

    Colour keeps its full resolution (4:4:4): small coloured things must survive. Raises ValueError
    for a side of more than MAX_JPEG_SIDE.
    """
    if max(rgb.shape) > MAX_JPEG_SIDE:
        raise ValueError(f"a JPEG has sides of up to {MAX_JPEG_SIDE}, got {list(rgb.shape)}")
    image_module = _pillow_image()
    buffer = io.BytesIO()
    image_module.fromarray(rgb).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def shrink_jpeg(data: bytes, limit_bytes: int) -> bytes:
    """The same picture as a JPEG of at most `limit_bytes`: `data` itself if it is one that fits,
    else a copy. `data`: as for `decode_picture`.

    The smallest copy has sides of up to 64 pixels, a few kB. Raises FrameDecodeError.
    """
    image_module = _pillow_image()
    if data[:3] != JPEG_MAGIC:
        rgb = decode_picture(data)
        step = -(-max(rgb.shape) // MAX_JPEG_SIDE)  # 1 but for the longest strips
        data = encode_jpeg(rgb[::step, ::step])
    if len(data) <= limit_bytes:
        return data
    smaller = data
    require_bounded(data)
    try:
        with image_module.open(io.BytesIO(_ended(data, image_module)), formats=["JPEG"]) as image:
            image.draft("RGB", (SHRINK_SIDES[0], SHRINK_SIDES[0]))  # decodes a large one at less
            picture = image_module.fromarray(
                _orientation_of(image).turn(np.asarray(image.convert("RGB")))
            )
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise FrameDecodeError(
            f"the JPEG is broken or cut off: {error}", where=f"{len(data)} bytes"
        ) from error
    for side in SHRINK_SIDES:
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=80)
        smaller = buffer.getvalue()
        if len(smaller) <= limit_bytes:
            break
    return smaller


def thumbnail(rgb: np.ndarray, size: int) -> np.ndarray:
    """Area-averaged grey picture, f32 [size, size] in 0..255, aspect ignored.

    Averaging hides the noise of a sensor. Rows first, in pieces: a large picture is never held as
    floats.
    """
    height = rgb.shape[0]
    edges = [row * height // size for row in range(size + 1)] if height >= size else []
    bands = [rgb[top:bottom].mean(axis=0, dtype=np.float32) for top, bottom in pairwise(edges)]
    grey: npt.NDArray[np.float32] = block_means(
        np.stack(bands) if bands else rgb.astype(np.float32), size
    ).mean(axis=2)
    return grey


def block_means(plane: np.ndarray, size: int) -> np.ndarray:
    """Means of size x size nearly equal blocks: f32 [H, W, ...] -> f32 [size, size, ...].

    A plane smaller than `size` is repeated first, so that no block is empty.
    """
    for axis in (0, 1):
        if plane.shape[axis] < size:
            plane = np.repeat(plane, -(-size // plane.shape[axis]), axis=axis)
    rows = np.arange(size) * plane.shape[0] // size
    columns = np.arange(size) * plane.shape[1] // size
    sums = np.add.reduceat(np.add.reduceat(plane, rows, axis=0), columns, axis=1)
    heights = np.diff(np.append(rows, plane.shape[0])).astype(np.float32)
    widths = np.diff(np.append(columns, plane.shape[1])).astype(np.float32)
    areas = (heights[:, None] * widths[None, :]).reshape((size, size) + (1,) * (plane.ndim - 2))
    means: npt.NDArray[np.float32] = (sums / areas).astype(np.float32)
    return means
