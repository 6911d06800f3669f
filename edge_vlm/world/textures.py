"""Cluttered, rather dark and grey backgrounds, each a function of its number alone.

The same arithmetic as `edge_vlm_training.world.backgrounds`, which draws many at once in torch:
the two differ by a rounded level in a few pixels of a million.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.frames import Rgb

NUM_BACKGROUNDS = 256
WIDE_BACKGROUNDS = range(256, 1280)
"""Numbers of further ones, with room for a camera that turns."""
GRID = 96  # places and sizes in the world are multiples of 1/96 of the picture's side
MARGIN = 1  # grid units of texture beyond each edge, for the camera's shake
WIDE_MARGIN = 25
BRIGHTEST = 138.0
DARKEST = 4.0
SEED = 20_231

Plane = npt.NDArray[np.float32]

_CUBIC = -0.75  # the kernel's free parameter, as of torch's bicubic interpolation


def margin_of(number: int) -> int:
    """Grid units of texture beyond each edge of background ``number``."""
    return WIDE_MARGIN if number in WIDE_BACKGROUNDS else MARGIN


def margin_pixels(size: int, margin: int = MARGIN) -> int:
    """Width in pixels of a margin around a picture of ``size`` pixels."""
    return max(1, round(size * margin / GRID))


def master_side(margin: int) -> int:
    """Pixels of a texture as it is drawn, before it is resized."""
    return 2 * (GRID + 2 * margin)


def area_weights(source: int, target: int) -> Plane:
    """Exact box-filter resampling weights, f32 [target, source]; each row sums to 1."""
    edges = np.arange(target + 1, dtype=np.float64) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    cell = np.arange(source, dtype=np.float64)
    overlap = (np.minimum(high, cell + 1) - np.maximum(low, cell)).clip(min=0)
    weights: Plane = (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    return weights


@lru_cache(maxsize=8)
def background(number: int, size: int) -> Rgb:
    """Background ``number`` with its margins, u8 [side, side, 3], for pictures of ``size`` pixels.

    ``side`` is ``size + 2 * margin_pixels(size, margin_of(number))``. Read-only.
    """
    margin = margin_of(number)
    weights = area_weights(master_side(margin), size + 2 * margin_pixels(size, margin))
    resized = weights @ _texture(number) @ weights.T
    picture = np.ascontiguousarray(np.rint(resized).astype(np.uint8).transpose(1, 2, 0))
    picture.setflags(write=False)
    return picture


def _texture(number: int) -> Plane:
    """f32 [3, side, side] in 0..255, of `master_side`."""
    side = master_side(margin_of(number))
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    rng = np.random.default_rng([SEED, number])
    grey = rng.uniform(35, 95)
    base = (grey + rng.uniform(-14, 14, 3)).astype(np.float32)
    picture = np.repeat(base, side * side).reshape(3, side, side)

    tilt = rng.normal(size=2)
    tilt *= rng.uniform(0, 45) / np.hypot(*tilt)
    picture += (axis[:, None] - 0.5) * float(tilt[0]) + (axis[None, :] - 0.5) * float(tilt[1])

    def grid(cells: int) -> Plane:
        # mostly the same for the three channels: clutter is grey, the things are not
        shared = rng.normal(size=(1, cells, cells))
        tint = 0.35 * rng.normal(size=(3, cells, cells))
        clutter: Plane = (shared + tint).astype(np.float32)
        return clutter

    coarse = grid(int(rng.integers(3, 10)))
    smooth = _cubic_weights(coarse.shape[1], side)
    picture += (smooth @ coarse @ smooth.T) * rng.uniform(5, 22)
    if rng.random() < 0.55:
        coarse = grid(int(rng.integers(3, 11)))
        scale = np.float32(coarse.shape[1] / side)
        nearest = np.floor(np.arange(side, dtype=np.float32) * scale).astype(np.int64)
        picture += coarse[:, nearest[:, None], nearest] * rng.uniform(5, 18)
    if rng.random() < 0.55:
        angle, cycles = rng.uniform(0, np.pi), rng.uniform(2, 9)
        along = axis[:, None] * float(np.sin(angle)) + axis[None, :] * float(np.cos(angle))
        wave = np.sin(2 * np.pi * (cycles * along + rng.random()))
        if rng.random() < 0.5:
            wave = np.tanh(3 * wave)
        picture += wave * rng.uniform(5, 20)
    return picture.clip(DARKEST, BRIGHTEST)


def _cubic_weights(source: int, target: int) -> Plane:
    """Of bicubic interpolation between cell centres, edges repeated: f32 [target, source]."""
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(places).astype(np.int64)
    weights = np.zeros((target, source), np.float32)
    for step in range(-1, 3):
        distance = np.abs(places - (first + step))
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        share = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(target), (first + step).clip(0, source - 1)), share)
    return weights
