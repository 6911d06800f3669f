"""One picture of a scene, in NumPy: for who draws a few and has no torch.

The same arithmetic as `edge_vlm_training.world.render`, which draws batches in torch. The two
differ by a level in few pixels, where their backgrounds or sums are rounded otherwise.

Shapes: S picture side, P side of a sprite, both in pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.frames import Rgb
from edge_vlm.world.scenes import COLOURS, NOISE_KEYS, Scenes
from edge_vlm.world.sprites import load_atlas
from edge_vlm.world.textures import GRID, area_weights, background, margin_of, margin_pixels

NOISE_STRIDE = 7  # two noise pictures are the same numbers, moved by multiples of this
NOISE_SEED = 77_003
DARKEST = 0.35  # share of the colour that a sprite's darkest detail keeps

Plane = npt.NDArray[np.float32]
_TINTS = np.array(list(COLOURS.values()), np.float32)


def pixels(grid_units: int, size: int) -> int:
    """Of a length, in a picture of ``size`` pixels."""
    return round(grid_units * size / GRID)


@lru_cache(maxsize=512)
def sprite(kind: int, side: int, size: int) -> tuple[Plane, Plane]:
    """Alpha and shade of a kind of ``side`` grid units, each f32 [P, P]. Read-only.

    Shade is alpha times the factor by which the colour is multiplied.
    """
    atlas = load_atlas()[kind].astype(np.float32) / 255
    alpha = atlas[..., 1]
    shade = alpha * (DARKEST + (1 - DARKEST) * atlas[..., 0])
    weights = area_weights(atlas.shape[0], pixels(side, size))
    resized = (weights @ alpha @ weights.T, weights @ shade @ weights.T)
    for each in resized:
        each.setflags(write=False)
    return resized


@lru_cache(maxsize=2)
def noise_numbers(size: int) -> Plane:
    """Standard normal, f32: noise picture k is what begins at k * NOISE_STRIDE. Read-only."""
    rng = np.random.default_rng(NOISE_SEED)
    noise = rng.standard_normal(size * size * 3 + NOISE_KEYS * NOISE_STRIDE, dtype=np.float32)
    noise.setflags(write=False)
    return noise


def draw(scenes: Scenes, clip: int, frame: int, size: int) -> Rgb:
    """One picture, u8 [S, S, 3]."""
    shift = np.rint(scenes.shake[clip, frame] * size).astype(np.int64)
    turned = np.rint((scenes.shake + scenes.pan)[clip, frame] * size).astype(np.int64)
    number = int(scenes.background[clip, frame])
    margin = margin_pixels(size, margin_of(number))
    column, row = (margin - turned.clip(-margin, margin)).tolist()
    texture = background(number, size)
    canvas = texture[row : row + size, column : column + size].astype(np.float32)
    for thing in np.flatnonzero(scenes.visible[clip, frame]):
        side = round(float(scenes.size[clip, thing]) * GRID)
        centre = np.array([scenes.x[clip, frame, thing], scenes.y[clip, frame, thing]])
        corner = np.rint(centre * GRID - side / 2)
        left, top = (np.rint(corner * size / GRID).astype(np.int64) + shift).tolist()
        alpha, shade = sprite(int(scenes.kind[clip, thing]), side, size)
        _blend(canvas, alpha, shade, left, top, _TINTS[scenes.colour[clip, frame, thing]])
    canvas *= scenes.brightness[clip, frame]
    begin = int(scenes.noise_key[clip, frame]) * NOISE_STRIDE
    noise = noise_numbers(size)[begin : begin + canvas.size].reshape(canvas.shape)
    canvas += noise * scenes.noise_sd[clip]
    return (canvas + 0.5).clip(0, 255).astype(np.uint8)


def _blend(canvas: Plane, alpha: Plane, shade: Plane, left: int, top: int, tint: Plane) -> None:
    """Puts a sprite on ``canvas`` f32 [S, S, 3], in place; what is beyond the edge is cut off."""
    size, extent = canvas.shape[0], alpha.shape[0]
    rows = slice(max(top, 0), min(top + extent, size))
    columns = slice(max(left, 0), min(left + extent, size))
    part = (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    under = canvas[rows, columns]
    canvas[rows, columns] = under * (1 - alpha[part])[..., None] + shade[part][..., None] * tint
