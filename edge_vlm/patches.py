"""Pictures to patches, in numpy: resize, normalise, cut, and the index math of patches and cells.

A patch is `patch_size` x `patch_size` pixels; a cell is 3x3 patches and becomes one token of the
language model. Both grids are numbered row-major from the top left. Published processors are
followed to the rounding: Molmo2 squashes a picture to a square (aspect ratio ignored), bilinear
with half-pixel centres and without antialias, rounds and clamps integer pictures, and maps [0, 255]
to [-1, 1].
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_vlm.config import CELL, VisionConfig


@lru_cache(maxsize=32)
def _sample_points(in_size: int, out_size: int) -> tuple[NDArray, NDArray, NDArray]:
    """Lower index, upper index and the upper one's weight for each output place along one axis.

    As torch's `interpolate(mode="bilinear", align_corners=False)` has it: the scale is an f32, the
    place is rounded to f32 once, behind a fused multiply and subtract.
    """
    scale = np.float32(in_size) / np.float32(out_size)
    place = ((np.arange(out_size) + 0.5) * np.float64(scale) - 0.5).astype(np.float32)
    place = np.maximum(place, np.float32(0))
    lower = np.minimum(place.astype(np.int64), in_size - 1)
    upper = np.minimum(lower + 1, in_size - 1)
    return lower, upper, place - lower.astype(np.float32)


def resize_bilinear(rgb: NDArray, size: int | tuple[int, int]) -> NDArray[np.float32]:
    """Resize `rgb` [H, W, C] to [size, size, C] or to (height, width), f32.

    uint8 input gives whole numbers in [0, 255], as the published processors do; float input is
    left unrounded. Raises ValueError for anything that is not a non-empty [H, W, C] array.
    """
    if rgb.ndim != 3 or 0 in rgb.shape:
        raise ValueError(f"rgb must be a non-empty [H, W, C] array, got shape {rgb.shape}")
    out_height, out_width = (size, size) if isinstance(size, int) else size
    height, width = rgb.shape[:2]
    if (height, width) == (out_height, out_width):
        return rgb.astype(np.float32)
    top, bottom, weight_y = _sample_points(height, out_height)
    left, right, weight_x = _sample_points(width, out_width)
    # Gathered while still bytes: a 1080p picture is never turned into floats as a whole.
    rows_top, rows_bottom = rgb[top], rgb[bottom]
    weight_x, weight_y = weight_x[None, :, None], weight_y[:, None, None]

    def across(rows: NDArray) -> NDArray:
        return rows[:, left] * (1 - weight_x) + rows[:, right] * weight_x

    out = across(rows_top) * (1 - weight_y) + across(rows_bottom) * weight_y
    if rgb.dtype == np.uint8:
        out = np.clip(np.rint(out), 0, 255)
    return out.astype(np.float32, copy=False)


def to_pixel_values(rgb: NDArray, cfg: VisionConfig) -> NDArray[np.float32]:
    """`rgb` u8 [H, W, 3] of any size -> normalised patches f32 [num_patches, patch_dim].

    Patches row-major, each flattened as (row, column, channel). Raises ValueError for another shape
    or dtype.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be uint8 [H, W, 3], got {rgb.dtype} {rgb.shape}")
    picture = resize_bilinear(rgb, cfg.image_size)
    picture = (picture * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    grid, side = cfg.patch_grid, cfg.patch_size
    patches = picture.reshape(grid, side, grid, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(patches).reshape(grid * grid, side * side * 3)


@lru_cache(maxsize=32)
def cell_table(cell_grid: int) -> NDArray[np.int64]:
    """[cell_grid**2, 9]: the patches of each cell, row-major inside the cell. Read-only, shared."""
    patch_grid = cell_grid * CELL
    patches = np.arange(patch_grid * patch_grid, dtype=np.int64)
    split = patches.reshape(cell_grid, CELL, cell_grid, CELL).transpose(0, 2, 1, 3)
    table = split.reshape(cell_grid * cell_grid, CELL * CELL)
    table.flags.writeable = False
    return table


def patch_indices_of_cells(cells: NDArray, cfg: VisionConfig) -> NDArray[np.int64]:
    """Patch numbers [K, 9] of `cells` [K]. Raises ValueError for a cell outside the grid."""
    cells = np.asarray(cells)
    if cells.size and (cells.min() < 0 or cells.max() >= cfg.num_cells):
        raise ValueError(
            f"cells must lie in [0, {cfg.num_cells}), got {cells.min()}..{cells.max()}"
        )
    return cell_table(cfg.cell_grid)[cells]


def cell_of_patches(cfg: VisionConfig) -> NDArray[np.int64]:
    """[num_patches]: the cell each patch belongs to."""
    out = np.empty(cfg.num_patches, dtype=np.int64)
    table = cell_table(cfg.cell_grid)
    out[table] = np.arange(cfg.num_cells)[:, None]
    return out
