"""How far a share or a count may lie from the truth: 95 % intervals, Wilson's and Garwood's."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def garwood(count: int) -> tuple[float, float]:
    """95 % interval of the mean of a Poisson variable of which `count` was seen: exact, so never
    too narrow (F. Garwood, 1936)."""

    def at_most(number: int, mean: float) -> float:
        if mean == 0:
            return 1.0
        terms = (k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(number + 1))
        return sum(map(math.exp, terms))

    def solved(is_above: Callable[[float], bool]) -> float:
        low, high = 0.0, 3.0 * count + 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if is_above(middle) else (middle, high)
        return (low + high) / 2

    high = solved(lambda mean: at_most(count, mean) < 0.025)
    if count == 0:
        return (0.0, high)
    return (solved(lambda mean: 1 - at_most(count - 1, mean) > 0.025), high)


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
