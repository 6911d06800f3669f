"""Samples of one thing that was measured, and what may be said of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

P99_SAMPLES = 100
"""A 99th percentile of fewer is one of the slowest few: it is not given."""
LEAST_SAMPLES = 3


@dataclass
class Series:
    """Values in the order in which they were taken, turn by turn."""

    turns: list[list[float]] = field(default_factory=list)

    def begin_turn(self) -> None:
        self.turns.append([])

    def add(self, value: float) -> None:
        if not self.turns:
            self.begin_turn()
        self.turns[-1].append(value)

    @property
    def values(self) -> list[float]:
        return [value for turn in self.turns for value in turn]

    @property
    def medians(self) -> list[float]:
        """One for each turn that has samples."""
        return [statistics.median(turn) for turn in self.turns if turn]

    def summary(self) -> dict[str, Any] | None:
        """Null without samples. `spread` is how far apart the medians of the turns are, as a share
        of their median; `p99` is null for fewer than P99_SAMPLES."""
        values = sorted(self.values)
        if not values:
            return None
        middle = statistics.median(values)
        medians = self.medians
        return {
            "n": len(values),
            "mean": _rounded(statistics.fmean(values)),
            "p50": _rounded(middle),
            "p90": _rounded(percentile(values, 0.9)),
            "p99": _rounded(percentile(values, 0.99)) if len(values) >= P99_SAMPLES else None,
            "min": _rounded(values[0]),
            "max": _rounded(values[-1]),
            "spread": _rounded((max(medians) - min(medians)) / middle) if middle else 0.0,
        }


def percentile(ascending: Sequence[float], share: float) -> float:
    """Linear between the two samples around it, as numpy's default."""
    place = (len(ascending) - 1) * share
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


def ratio_of_turns(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float] | None:
    """How many times faster `other` was, turn by turn: median, least and most. None without turns.

    A machine whose speed drifts slows both alike, so that a ratio within a turn holds.
    """
    found = sorted(a / b for a, b in zip(baseline, other, strict=False) if b > 0)
    if not found:
        return None
    return {
        "median": _rounded(statistics.median(found)),
        "least": _rounded(found[0]),
        "most": _rounded(found[-1]),
        "turns": len(found),
    }


def repeat_for(run: Callable[[], None], samples: int, limit_s: float) -> None:
    """Calls `run` so often, or until `limit_s` have passed and it ran LEAST_SAMPLES times."""
    begin = time.monotonic()
    for done in range(samples):
        if done >= LEAST_SAMPLES and time.monotonic() - begin > limit_s:
            return
        run()


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
