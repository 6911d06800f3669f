"""The backgrounds of `edge_vlm.world.textures`, all of them at once, in torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_vlm.world.textures import (
    BRIGHTEST,
    DARKEST,
    NUM_BACKGROUNDS,
    SEED,
    WIDE_BACKGROUNDS,
    margin_of,
    margin_pixels,
    master_side,
)

_CHUNK = 32


def area_matrix(source: int, target: int) -> Tensor:
    """Exact box-filter resampling weights, f32 [target, source]; each row sums to 1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    cell = torch.arange(source, dtype=torch.float64)
    overlap = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def _draw(first: int, count: int) -> Tensor:
    """Textures number first .. first + count - 1, f32 [count, 3, side, side] in 0..255."""
    side = master_side(margin_of(first))
    axis = (torch.arange(side) + 0.5) / side
    pictures = []
    for number in range(first, first + count):
        rng = np.random.default_rng([SEED, number])
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
    return torch.stack(pictures).clamp(DARKEST, BRIGHTEST)


@lru_cache(maxsize=4)
def background_bank(size: int) -> Tensor:
    """All narrow textures for pictures of ``size`` pixels, u8 [numbers, side, side, 3] on the CPU.

    ``side`` is the picture plus ``margin_pixels`` on every edge. Resized by exact areas, so
    that a bank of twice the size, averaged 2 x 2, is this bank up to rounding.
    """
    chunks = [_resized(first, _CHUNK, size) for first in range(0, NUM_BACKGROUNDS, _CHUNK)]
    return torch.cat(chunks).contiguous()


@lru_cache(maxsize=len(WIDE_BACKGROUNDS))
def wide_background(number: int, size: int) -> Tensor:
    """One of the wide ones, u8 [side, side, 3]: drawn when it is needed, as there are many."""
    return _resized(number, 1, size)[0].contiguous()


def _resized(first: int, count: int, size: int) -> Tensor:
    margin = margin_of(first)
    weights = area_matrix(master_side(margin), size + 2 * margin_pixels(size, margin))
    drawn = weights @ _draw(first, count) @ weights.T
    return drawn.round().to(torch.uint8).permute(0, 2, 3, 1)
