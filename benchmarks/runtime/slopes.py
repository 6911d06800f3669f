"""Does a figure grow with time? Slopes per hour behind a warm-up, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCKS = 20
T_975 = 2.101
"""Student's t of 97.5 % with BLOCKS - 2 degrees of freedom."""
GROWS, FLAT, UNCLEAR = "grows", "flat", "unclear"

Series = Sequence[tuple[float, float]]
"""Seconds since the begin, and a value."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """A straight line through the means of BLOCKS equal parts of the time.

    Samples near each other are alike (a session's cache, a sawtooth of an allocator), so that an
    interval from single samples would be too narrow; means of long parts are nearly independent.
    """

    level: float
    """Mean of all blocks."""
    per_hour: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        """`tolerance`: the slope an hour, in the figure's unit, below which growth is called noise.

        `grows`: the whole interval is above 0 and the slope above the tolerance; `flat`: it is not,
        and the interval ends below twice the tolerance, so a slope worth a word would have been
        seen; else `unclear`."""
        if self.low > 0 and self.per_hour > tolerance:
            return GROWS
        return FLAT if self.high <= 2 * tolerance else UNCLEAR


def slope_of(
    series: Series,
    begin_s: float,
    end_s: float,
    of_block: Callable[[Sequence[float]], float] = lambda values: float(np.mean(values)),
) -> Slope | None:
    """The slope between these times; None if one of the blocks has no value."""
    blocks: list[list[float]] = [[] for _ in range(BLOCKS)]
    for seconds, value in series:
        if begin_s <= seconds < end_s:
            blocks[int((seconds - begin_s) / (end_s - begin_s) * BLOCKS)].append(value)
    if not all(blocks):
        return None
    values = np.array([of_block(block) for block in blocks])
    hours = (np.arange(BLOCKS) + 0.5) * (end_s - begin_s) / BLOCKS / 3600
    centred = hours - hours.mean()
    spread = float(centred @ centred)
    per_hour = float(centred @ values) / spread
    rest = values - values.mean() - per_hour * centred
    half = T_975 * math.sqrt(float(rest @ rest) / (BLOCKS - 2) / spread)
    return Slope(
        level=float(values.mean()), per_hour=per_hour, low=per_hour - half, high=per_hour + half
    )


def judged(slope: Slope | None, tolerance: float) -> dict[str, Any]:
    """What the result file says of one figure."""
    if slope is None:
        return {"verdict": UNCLEAR, "why": "too few samples"}
    return {
        "level": _short(slope.level),
        "per_hour": _short(slope.per_hour),
        "interval": [_short(slope.low), _short(slope.high)],
        "tolerance": _short(tolerance),
        "verdict": slope.verdict(tolerance),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) > 1e-9 else 0.0
