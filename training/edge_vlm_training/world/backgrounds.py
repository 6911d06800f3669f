"""Cluttered, rather dark and grey background textures, each a function of its number alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BACKGROUNDS = 256
GRID = 96  # places and sizes in the world are multiples of 1/96 of the picture's side
MARGIN = 1  # grid units of texture beyond each edge, for the camera's shake
MASTER_SIDE = 2 * (GRID + 2 * MARGIN)
BRIGHTEST = 138.0

_CHUNK = 32
_SEED = 20_231


def area_matrix(source: int, target: int) -> Tensor:
    """Exact box-filter resampling weights, f32 [target, source]; each row sums to 1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    cell = torch.arange(source, dtype=torch.float64)
    overlap = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def _draw(first: int, count: int) -> Tensor:
    """Textures number first .. first + count - 1, f32 [count, 3, side, side] in 0..255."""
    side = MASTER_SIDE
    axis = (torch.arange(side) + 0.5) / side
    pictures = []
    for number in range(first, first + count):
        rng = np.random.default_rng([_SEED, number])
        grey = rng.uniform(35, 95)
        base = torch.tensor(grey + rng.uniform(-14, 14, 3), dtype=torch.float32)
        picture = base[:, None, None].expand(3, side, side).clone()

        tilt = rng.normal(size=2)
        tilt *= rng.uniform(0, 45) / np.hypot(*tilt)
        picture += (axis[:, None] - 0.5) * tilt[0] + (axis[None, :] - 0.5) * tilt[1]

        def grid(cells: int, rng: np.random.Generator = rng) -> Tensor:
            # mostly the same for the three channels: clutter is grey, the objects are not
            shared = rng.normal(size=(1, 1, cells, cells))
            tint = 0.35 * rng.normal(size=(1, 3, cells, cells))
            return torch.tensor(shared + tint, dtype=torch.float32)

        blobs = F.interpolate(grid(int(rng.integers(3, 10))), size=side, mode="bicubic")
        picture += blobs[0] * rng.uniform(5, 22)
        if rng.random() < 0.55:
            blocks = F.interpolate(grid(int(rng.integers(3, 11))), size=side, mode="nearest")
            picture += blocks[0] * rng.uniform(5, 18)
        if rng.random() < 0.55:
            angle, cycles = rng.uniform(0, np.pi), rng.uniform(2, 9)
            along = axis[:, None] * np.sin(angle) + axis[None, :] * np.cos(angle)
            wave = torch.sin(2 * np.pi * (cycles * along + rng.random()))
            if rng.random() < 0.5:
                wave = (3 * wave).tanh()
            picture += wave * rng.uniform(5, 20)
        pictures.append(picture)
    return torch.stack(pictures).clamp(4, BRIGHTEST)


@lru_cache(maxsize=4)
def background_bank(size: int) -> Tensor:
    """All textures for pictures of ``size`` pixels, u8 [numbers, side, side, 3] on the CPU.

    ``side`` is the picture plus ``margin_pixels(size)`` on every edge. Resized by exact areas, so
    that a bank of twice the size, averaged 2 x 2, is this bank up to rounding.
    """
    side = size + 2 * margin_pixels(size)
    weights = area_matrix(MASTER_SIDE, side)
    chunks = []
    for first in range(0, NUM_BACKGROUNDS, _CHUNK):
        drawn = weights @ _draw(first, _CHUNK) @ weights.T
        chunks.append(drawn.round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(chunks).contiguous()


def margin_pixels(size: int) -> int:
    """Width in pixels of the margin around a picture of ``size`` pixels."""
    return max(1, round(size * MARGIN / GRID))
