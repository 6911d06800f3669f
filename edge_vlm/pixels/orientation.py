"""Which way up a picture is shown: eight ways, numbered as EXIF does.

Phones and cameras store what the sensor gave, and beside it how to turn it. No library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt


class Orientation(Enum):
    """How a stored picture becomes an upright one; the value is that of EXIF's tag 274."""

    UPRIGHT = 1
    MIRRORED = 2
    """Left and right change places."""
    HALF_TURN = 3
    FLIPPED = 4
    """Top and bottom change places."""
    TRANSPOSED = 5
    QUARTER_TURN = 6
    """Clockwise."""
    TRANSVERSED = 7
    THREE_QUARTER_TURN = 8
    """Clockwise."""

    @classmethod
    def of_exif(cls, value: object) -> Orientation:
        """Of the tag's value; upright for what the standard does not know."""
        return cls(value) if isinstance(value, int) and 1 <= value <= 8 else cls.UPRIGHT

    @classmethod
    def of_matrix(cls, numbers: Sequence[int]) -> Orientation:
        """Of a display matrix: nine numbers, row by row, as containers hold it and FFmpeg hands it
        on. A matrix between two orientations counts as the nearer one."""
        right, down = numbers[0:2], numbers[3:5]  # where one step right and one step down lead
        turns = abs(right[0]) + abs(down[1]) < abs(right[1]) + abs(down[0])
        x, y = (down[0], right[1]) if turns else (right[0], down[1])
        return _BY_STEPS[turns, x < 0, y < 0]

    @classmethod
    def of_rotation(cls, degrees: float) -> Orientation:
        """Of a rotation without mirroring, counter-clockwise."""
        quarters = math.floor(-degrees / 90 + 0.5) % 4
        turns = (cls.UPRIGHT, cls.QUARTER_TURN, cls.HALF_TURN, cls.THREE_QUARTER_TURN)
        return turns[quarters]

    @property
    def swaps_sides(self) -> bool:
        """Whether the upright picture is as wide as the stored one is high."""
        return self.value >= 5

    def turn(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """u8 [H, W, 3], stored -> u8 [H, W, 3] or [W, H, 3], upright."""
        if self is Orientation.UPRIGHT:
            return rgb
        swaps, flips_x, flips_y = _STEPS[self]
        turned = rgb.transpose(1, 0, 2) if swaps else rgb
        turned = turned[:: -1 if flips_y else 1, :: -1 if flips_x else 1]
        return np.ascontiguousarray(turned)


_STEPS = {
    Orientation.UPRIGHT: (False, False, False),
    Orientation.MIRRORED: (False, True, False),
    Orientation.HALF_TURN: (False, True, True),
    Orientation.FLIPPED: (False, False, True),
    Orientation.TRANSPOSED: (True, False, False),
    Orientation.QUARTER_TURN: (True, True, False),
    Orientation.TRANSVERSED: (True, True, True),
    Orientation.THREE_QUARTER_TURN: (True, False, True),
}
"""Whether rows and columns change places, and then whether x and y run backwards."""
_BY_STEPS = {steps: orientation for orientation, steps in _STEPS.items()}
