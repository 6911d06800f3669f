"""Counts of right answers and how far a share may lie from the truth: 95 % Wilson intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.96


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % score interval of a share seen in `count` independent trials, which may be a fraction.

    (E. B. Wilson, 1927; unlike the normal one it stays inside 0..1 and has a width at 0 and at 1.)
    (0, 1) without any trial.
    """
    if count <= 0:
        return (0.0, 1.0)
    z2 = Z95 * Z95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count * count)
    half = Z95 / (1 + z2 / count) * math.sqrt(max(spread, 0.0))
    return (max(middle - half, 0.0), min(middle + half, 1.0))


@dataclass
class Proportion:
    """Right answers of independent questions."""

    right: int = 0
    asked: int = 0

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the share."""
        return wilson(self.share, self.asked)
