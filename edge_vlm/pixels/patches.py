"""Pictures to patches, in numpy: resize, normalise, cut, and the index math of patches and cells.

A patch is `patch_size` x `patch_size` pixels; a cell is 3x3 patches and becomes one token of the
language model. Both grids are numbered row-major from the top left. Published processors are
followed to the rounding: Molmo2 squashes a picture to a square (aspect ratio ignored), bilinear
with half-pixel centres and without antialias, rounds and clamps integer pictures, and maps [0, 255]
to [-1, 1].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_vlm.config import CELL, VisionConfig

_Points = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

_TIE = 2.0**-12
"""How near a half a resized value must lie to be summed again; rounding moves it by 2**-14."""
_HALF = np.float32(127.5)
_ROWS = 64
"""That are resized at once."""


@lru_cache(maxsize=32)
def _sample_points(in_size: int, out_size: int) -> _Points:
    """Lower index, upper index and the upper one's weight for each output place along one axis.

    As torch's `interpolate(mode="bilinear", align_corners=False)` has it: the scale is an f32, the
    place is rounded to f32 once, after a fused multiply and subtract.
    """
    scale = np.float32(in_size) / np.float32(out_size)
    place = ((np.arange(out_size) + 0.5) * np.float64(scale) - 0.5).astype(np.float32)
    place = np.maximum(place, np.float32(0))
    lower = np.minimum(place.astype(np.int64), in_size - 1)
    upper = np.minimum(lower + 1, in_size - 1)
    return lower, upper, place - lower.astype(np.float32)


def resize_bilinear(rgb: NDArray[Any], size: int | tuple[int, int]) -> NDArray[np.float32]:
    """Resize `rgb` [H, W, C] to [size, size, C] or to (height, width), f32.

    uint8 input gives whole numbers in [0, 255], as the published processors do, for three channels
    to the last bit as torch computes them on one thread; float input is left unrounded. Raises
    ValueError for anything that is not a non-empty [H, W, C] array.
    """
    if rgb.ndim != 3 or 0 in rgb.shape:
        raise ValueError(f"rgb must be a non-empty [H, W, C] array, got shape {rgb.shape}")
    out_height, out_width = (size, size) if isinstance(size, int) else size
    height, width = rgb.shape[:2]
    if (height, width) == (out_height, out_width):
        return rgb.astype(np.float32)
    if rgb.dtype == np.uint8:
        return _resize_bytes(rgb, out_height, out_width).astype(np.float32)
    rows, columns = _sample_points(height, out_height), _sample_points(width, out_width)
    (top, bottom, weight_y), (left, right, weight_x) = rows, columns
    rows_top, rows_bottom = rgb[top], rgb[bottom]
    weight_x, weight_y = weight_x[None, :, None], weight_y[:, None, None]

    def across(lines: NDArray[Any]) -> NDArray[Any]:
        mixed: NDArray[Any] = lines[:, left] * (1 - weight_x) + lines[:, right] * weight_x
        return mixed

    out: NDArray[Any] = across(rows_top) * (1 - weight_y) + across(rows_bottom) * weight_y
    return out.astype(np.float32, copy=False)


def _resize_bytes(rgb: NDArray[np.uint8], out_height: int, out_width: int) -> NDArray[np.uint8]:
    """As `resize_bilinear`, of bytes of another size.

    A row is one run of numbers, colours side by side: loops over three are slow. Some rows at a
    time, because what does not fit a cache takes most of the time; what is summed again, of all
    rows at once, because it is little.
    """
    height, width, channels = rgb.shape
    rows, columns = _sample_points(height, out_height), _sample_points(width, out_width)
    (top, bottom, weight_y), (left, right, weight_x) = rows, columns
    lines = rgb.reshape(height, width * channels)
    left, right = (
        (side[:, None] * channels + np.arange(channels)).ravel() for side in (left, right)
    )
    weight_x = np.repeat(weight_x, channels)
    is_wide = width > 2 * out_width
    out = np.empty((out_height, out_width * channels), np.uint8)
    ties: list[NDArray[Any]] = []
    for start in range(0, out_height, _ROWS):
        some = slice(start, start + _ROWS)
        pair = lines.take(top[some], axis=0), lines.take(bottom[some], axis=0)
        down = weight_y[some, None]
        if is_wide:  # few of its columns are needed
            upper, lower = (
                _mixed(row.take(left, axis=1), row.take(right, axis=1), weight_x) for row in pair
            )
            mixed = _mixed(upper, lower, down)
        else:
            row = _mixed(*pair, down)
            mixed = _mixed(row.take(left, axis=1), row.take(right, axis=1), weight_x)
        whole = np.rint(mixed)
        out[some] = whole
        mixed -= whole
        near = np.flatnonzero(np.abs(mixed, out=mixed) > 0.5 - _TIE)
        ties.append(near + start * out.shape[1])
    again = np.concatenate(ties)
    out = out.reshape(out_height, out_width, channels)
    where = np.unravel_index(again, out.shape)
    out.reshape(-1)[again] = np.rint(_fused_sum(rgb, rows, columns, where))
    return out


def _mixed(
    low: NDArray[Any], high: NDArray[Any], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`high` by its weight and `low` by the rest of 1."""
    low, mixed = low.astype(np.float32, copy=False), high.astype(np.float32, copy=False)
    mixed -= low
    mixed *= weight
    mixed += low
    return mixed


def _fused_sum(
    rgb: NDArray[Any], rows: _Points, columns: _Points, where: tuple[NDArray[Any], ...]
) -> NDArray[np.float32]:
    """The unrounded value at some places (y, x, channel), in the order torch sums it on a CPU.

    Four products of pixel and weight; all but the first are added in one rounding (fused). Only
    values next to a half need this, there the last bit decides which whole number they become.
    """
    y, x, channel = where
    (top, bottom, weight_y), (left, right, weight_x) = rows, columns
    low_y, low_x = weight_y[y], weight_x[x]
    high_y, high_x = 1 - low_y, 1 - low_x
    total: NDArray[np.float32] = rgb[top[y], right[x], channel] * (high_y * low_x)
    for row, column, weight in (
        (top, left, high_y * high_x),
        (bottom, left, low_y * high_x),
        (bottom, right, low_y * low_x),
    ):
        product = rgb[row[y], column[x], channel].astype(np.float64) * weight
        total = (product + total).astype(np.float32)
    return total


def normalise(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """[0, 255] to [-1, 1]: mean and deviation of 0.5, as the published processors fuse them."""
    return (picture - _HALF) / _HALF


def cut_patches(pictures: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """[n, S, S, 3] -> patches [n, (S / patch_size)**2, 3 * patch_size**2].

    Patches row-major, each flattened as (row, column, channel).
    """
    count, size = pictures.shape[:2]
    grid = size // patch_size
    split = pictures.reshape(count, grid, patch_size, grid, patch_size, 3)
    patches = np.ascontiguousarray(split.transpose(0, 1, 3, 2, 4, 5))
    return patches.reshape(count, grid * grid, patch_size * patch_size * 3)


def require_rgb(rgb: NDArray[Any]) -> None:
    """Raises ValueError for anything but u8 [H, W, 3] with at least one pixel."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be uint8 [H, W, 3], got {rgb.dtype} {rgb.shape}")
    if 0 in rgb.shape:
        raise ValueError(f"rgb must be a non-empty [H, W, C] array, got shape {rgb.shape}")


def to_pixel_values(rgb: NDArray[Any], cfg: VisionConfig) -> NDArray[np.float32]:
    """`rgb` u8 [H, W, 3] of any size -> normalised patches f32 [num_patches, patch_dim].

    Patches row-major, each flattened as (row, column, channel). Raises ValueError for another shape
    or dtype.
    """
    require_rgb(rgb)
    size = cfg.image_size
    picture = rgb if rgb.shape[:2] == (size, size) else _resize_bytes(rgb, size, size)
    patches = cut_patches(picture[None], cfg.patch_size)[0]
    values: NDArray[np.float32] = np.subtract(patches, _HALF, dtype=np.float32)
    values /= _HALF
    return values


@lru_cache(maxsize=32)
def cell_table(cell_grid: int) -> NDArray[np.int64]:
    """[cell_grid**2, 9]: the patches of each cell, row-major inside the cell. Read-only, shared."""
    patch_grid = cell_grid * CELL
    patches = np.arange(patch_grid * patch_grid, dtype=np.int64)
    split = patches.reshape(cell_grid, CELL, cell_grid, CELL).transpose(0, 2, 1, 3)
    table = split.reshape(cell_grid * cell_grid, CELL * CELL)
    table.flags.writeable = False
    return table


def patch_indices_of_cells(cells: NDArray[Any], cfg: VisionConfig) -> NDArray[np.int64]:
    """Patch numbers [K, 9] of `cells` [K]. Raises ValueError for a cell outside the grid."""
    cells = np.asarray(cells)
    if cells.size and (cells.min() < 0 or cells.max() >= cfg.num_cells):
        raise ValueError(
            f"cells must lie in [0, {cfg.num_cells}), got {cells.min()}..{cells.max()}"
        )
    patches: NDArray[np.int64] = cell_table(cfg.cell_grid)[cells]
    return patches
