"""A still picture at full detail, in numpy: overlapping crops, pooling windows and their grids.

Molmo2 looks at a picture twice (arXiv 2601.10611, section 2; transformers' `Molmo2ImageProcessor`):
the *low-resolution view* is the whole picture squashed to one input of the vision transformer; the
*tiled view* is the picture resized to a canvas which several inputs, the *crops*, cover. Crops
overlap, so that every patch is seen with its surroundings; of the patches seen twice one is used.
Every 2x2 patches of a view are pooled to one token. Nothing of an image is pruned.

A live session sends one frame this way when a question needs more than video detail can show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_vlm.config import VisionConfig, require_numbers
from edge_vlm.pixels.patches import cut_patches, normalise, require_rgb, resize_bilinear

PADDING = -1
"""Stands in a pooling window where the view has no patch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How a picture is cut; the defaults are those of every published Molmo2.

    Fewer crops cost fewer tokens: `dataclasses.replace(cfg, max_crops=2)`.
    """

    max_crops: int = 8
    """Of the tiled view; the low-resolution view comes on top."""
    overlap: tuple[int, int] = (4, 4)
    """Patches at the left and top, and at the right and bottom, of a crop that only give context
    to the others, except at the edge of the picture."""
    pool: int = 2
    """Patches along one side of a pooling window."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap", tuple(self.overlap))
        require_numbers(self)
        for field, rule, holds in (
            ("max_crops", "must be positive", self.max_crops > 0),
            ("overlap", "must be two counts", len(self.overlap) == 2 and min(self.overlap) >= 0),
            ("pool", "must be positive", self.pool > 0),
        ):
            if not holds:
                raise ValueError(f"ImageConfig.{field} = {getattr(self, field)!r}: {rule}")

    def window_patches(self, vision: VisionConfig) -> int:
        """By how many patches one crop lies apart from the next. Raises ValueError below one."""
        apart = vision.patch_grid - sum(self.overlap)
        if apart < 1:
            raise ValueError(
                f"ImageConfig.overlap = {self.overlap}: a crop has only {vision.patch_grid} patches"
            )
        return apart


class ImageGrid(NamedTuple):
    """Tokens of an image: rows and columns of the low-resolution view, then of the tiled one."""

    low_rows: int
    low_columns: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """Patch tokens of both views, markers not counted."""
        return self.low_rows * self.low_columns + self.rows * self.columns


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageCrops:
    """A picture, ready for the vision transformer."""

    pixels: NDArray[np.float32]
    """Normalised patches [crops, num_patches, patch_dim]; the low-resolution view is the first."""
    windows: NDArray[np.int32]
    """[tokens, pool**2]: the patches of each token, numbered through all crops, or `PADDING`."""
    grid: ImageGrid


def all_tilings(max_crops: int) -> list[tuple[int, int]]:
    """Rows and columns of every tiling of up to `max_crops` crops, those of fewer crops first."""
    tilings = [
        (rows, columns)
        for rows in range(1, max_crops + 1)
        for columns in range(1, max_crops // rows + 1)
    ]
    return sorted(tilings, key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))


def choose_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of `window` pixels each to which a picture fits best.

    The tiling that enlarges least; if all of them shrink the picture, the one that shrinks least.
    A side that is zero or negative (a picture smaller than the margins) never decides.
    """
    tilings = all_tilings(max_crops)
    sizes = np.array(tilings, np.float32) * np.float32(window)
    with np.errstate(divide="ignore"):
        scales = (sizes / np.array([height, width], np.float32)).min(axis=1)
    if (scales < 1).all():
        return tilings[int(scales.argmax())]
    return tilings[int(np.where(scales < 1, np.inf, scales).argmin())]


def _tiling(height: int, width: int, vision: VisionConfig, cfg: ImageConfig) -> tuple[int, int]:
    margins = sum(cfg.overlap) * vision.patch_size
    window = cfg.window_patches(vision) * vision.patch_size
    return choose_tiling(height - margins, width - margins, window, cfg.max_crops)


def image_grid(height: int, width: int, vision: VisionConfig, cfg: ImageConfig) -> ImageGrid:
    """The tokens a picture of this size will have, without touching its pixels."""
    return grid_of(_tiling(height, width, vision, cfg), vision, cfg)


def image_crops(height: int, width: int, vision: VisionConfig, cfg: ImageConfig) -> int:
    """The inputs of the ViT that a picture of this size will have, both views together."""
    rows, columns = _tiling(height, width, vision, cfg)
    return 1 + rows * columns


def grid_of(tiling: tuple[int, int], vision: VisionConfig, cfg: ImageConfig) -> ImageGrid:
    """The tokens of a picture that is cut into `tiling`, rows and columns of crops."""
    apart, margins = cfg.window_patches(vision), sum(cfg.overlap)
    rows, columns = tiling
    sides = (
        vision.patch_grid,
        vision.patch_grid,
        rows * apart + margins,
        columns * apart + margins,
    )
    return ImageGrid(*(-(-side // cfg.pool) for side in sides))


def pooling_windows(patches: NDArray[Any], pool: int) -> tuple[NDArray[np.int32], int, int]:
    """Patch numbers [h, w] -> windows [rows * columns, pool**2], rows and columns.

    What is missing to a multiple of `pool` is padded on both sides, the odd one at the end.
    """
    lacking = [-side % pool for side in patches.shape]
    around = [(lack // 2, lack - lack // 2) for lack in lacking]
    padded = np.pad(patches, around, constant_values=PADDING).astype(np.int32)
    rows, columns = (side // pool for side in padded.shape)
    windows = padded.reshape(rows, pool, columns, pool).transpose(0, 2, 1, 3)
    return windows.reshape(rows * columns, pool * pool), rows, columns


def canvas_patches(
    rows: int, columns: int, vision: VisionConfig, cfg: ImageConfig
) -> NDArray[np.int64]:
    """The crop patch that stands for each patch of the canvas, numbered through the crops."""
    grid, apart = vision.patch_grid, cfg.window_patches(vision)

    def owners(crops: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The crop of each place along one side, and the place inside it."""
        places = np.arange(crops * apart + sum(cfg.overlap))
        crop = np.clip((places - cfg.overlap[0]) // apart, 0, crops - 1)
        return crop, places - crop * apart

    (crop_y, y), (crop_x, x) = owners(rows), owners(columns)
    crop = crop_y[:, None] * columns + crop_x
    return crop * vision.num_patches + y[:, None] * grid + x


def prepare_image(rgb: NDArray[Any], vision: VisionConfig, cfg: ImageConfig) -> ImageCrops:
    """`rgb` u8 [H, W, 3] of any size -> its crops.

    Equal to the published processors to the last bit. Raises ValueError for another shape or dtype.
    """
    require_rgb(rgb)
    side, step = vision.image_size, cfg.window_patches(vision) * vision.patch_size
    margins = sum(cfg.overlap) * vision.patch_size
    height, width = rgb.shape[:2]
    rows, columns = _tiling(height, width, vision, cfg)
    canvas = resize_bilinear(rgb, (rows * step + margins, columns * step + margins))
    crops = [
        canvas[y : y + side, x : x + side]
        for y in range(0, rows * step, step)
        for x in range(0, columns * step, step)
    ]
    views = normalise(np.stack([resize_bilinear(rgb, side), *crops]))
    low = np.arange(vision.num_patches).reshape(vision.patch_grid, vision.patch_grid)
    tiled = canvas_patches(rows, columns, vision, cfg) + vision.num_patches
    low_windows, *low_grid = pooling_windows(low, cfg.pool)
    tiled_windows, *tiled_grid = pooling_windows(tiled, cfg.pool)
    return ImageCrops(
        pixels=cut_patches(views, vision.patch_size),
        windows=np.concatenate([low_windows, tiled_windows]),
        grid=ImageGrid(*low_grid, *tiled_grid),
    )


def join_images(images: Sequence[ImageCrops]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Pixels and windows of several images of one prompt, patches numbered through all of them."""
    windows, first = [], 0
    for image in images:
        windows.append(np.where(image.windows == PADDING, PADDING, image.windows + first))
        first += image.pixels.shape[0] * image.pixels.shape[1]
    pixels = np.concatenate([image.pixels for image in images])
    return pixels, np.concatenate(windows).astype(np.int32)
