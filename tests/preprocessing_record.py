"""What the published processors were seen to make, and the pictures they made it of.

`tests/published_processors.py` writes the record; numpy alone is needed to compare with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATH = Path(__file__).parent / "data" / "preprocessing.json"
PUBLISHED_4B = Path(__file__).parents[2] / "shared" / "molmo2-4b"
"""The published folder without its weights, where it lies beside the clone."""

IMAGES = (
    # Height, width and most crops: common sizes, then smaller than the margins of 112 pixels, one
    # or both sides equal to them, very wide, tall with few crops, and more crops than in training.
    *((480, 640, 8), (1080, 1920, 8), (60, 90, 8), (112, 300, 8), (112, 112, 8), (300, 1700, 8)),
    *((900, 500, 3), (756, 756, 1), (1300, 1500, 24)),
)
FRAMES = ((270, 480), (378, 378), (50, 720))
FRAMES_OF_EACH = 2

QUESTION = "What does the label say?"
ANSWER = "Milk, 2.5 %."
IMAGE_PROMPTS = (((480, 640),), ((480, 640), (60, 90), (900, 500)))
STAMPS_S = (0.0, 0.25, 1.25, 12.0)


def load() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(PATH.read_text())
    return record


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """u8 [H, W, 3] by whole-number arithmetic, the same everywhere: a fine and a coarse pattern."""
    y, x, channel = np.ogrid[:height, :width, :3]
    mixed = (y * 179 + x * 73 + channel * 283 + seed * 419 + y * x) % 1009
    coarse = (y * 255 // max(1, height - 1) + x * (channel + 1) * 90 // width) % 256
    picture: NDArray[np.uint8] = np.where(
        (y // 16 + x // 16) % 2, mixed * mixed % 251, coarse
    ).astype(np.uint8)
    return picture


def digest(array: NDArray[Any]) -> str:
    """Of the bytes, little-endian."""
    little = array.astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()


def unfold(runs: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """[value, how often in a row] pairs -> the values."""
    values, counts = zip(*runs, strict=True)
    return np.repeat(values, counts)
