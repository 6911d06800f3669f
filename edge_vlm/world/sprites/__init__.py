"""Sprites of the rendered world: 40 kinds of things as luminance and alpha, tinted when drawn.

The first eight kinds are shapes drawn by ``make_atlas.py``; the others are rasterised from the Noto
Color Emoji font (SIL Open Font License 1.1, see OFL.txt beside this file).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
THINGS = (
    "cat", "dog", "car", "fish", "bird", "tree", "house", "boat",
    "plane", "key", "cup", "chair", "mushroom", "bell", "crown", "hat",
    "butterfly", "snowman", "shirt", "guitar", "hand", "cactus", "shoe", "ladder",
    "bicycle", "balloon", "snail", "clock", "banana", "drum", "moon", "flag",
)  # fmt: skip
KINDS: tuple[str, ...] = SHAPES + THINGS

SPRITE_SIDE = 64
ATLAS_PATH = Path(__file__).with_name("atlas.npz")


@lru_cache(maxsize=1)
def load_atlas() -> npt.NDArray[np.uint8]:
    """The atlas, u8 [kinds, 64, 64, 2]: luminance (0 where alpha is 0), alpha. Read-only."""
    with np.load(ATLAS_PATH) as data:
        atlas: npt.NDArray[np.uint8] = data["sprites"]
    if atlas.shape != (len(KINDS), SPRITE_SIDE, SPRITE_SIDE, 2):
        raise ValueError(f"sprite atlas {ATLAS_PATH.name} has shape {atlas.shape}")
    atlas.setflags(write=False)
    return atlas
