"""The judge of the soak: growth is seen in noise, and noise is no growth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.runtime.slopes import FLAT, GROWS, UNCLEAR, Series, judged, slope_of

HOURS = 2.0
END_S = HOURS * 3600
WARM_UP_S = 0.2 * END_S
TOLERANCE_MB = 1.0


def series(per_hour: float = 0.0, noise: float = 1.0, seed: int = 0) -> list[tuple[float, float]]:
    """A sample each five seconds of 150 MB that grow so much an hour, with alike neighbours."""
    rng = np.random.default_rng(seed)
    drift = 0.0
    made = []
    for at_s in np.arange(0.0, END_S, 5.0):
        drift = 0.95 * drift + rng.normal(0.0, noise)
        made.append((float(at_s), 150.0 + per_hour * at_s / 3600 + drift))
    return made


def verdict(values: Series) -> str:
    found = judged(slope_of(values, WARM_UP_S, END_S), TOLERANCE_MB)["verdict"]
    assert isinstance(found, str)
    return found


def test_growth_is_seen() -> None:
    assert [verdict(series(10.0, seed=seed)) for seed in range(20)] == [GROWS] * 20


def test_noise_is_no_growth() -> None:
    verdicts = [verdict(series(0.0, noise=0.2, seed=seed)) for seed in range(40)]
    assert verdicts.count(FLAT) >= 38  # of 40 intervals of 95 %
    assert verdicts.count(GROWS) <= 1


def test_less_than_can_be_told_is_unclear() -> None:
    assert verdict(series(0.5, noise=8.0)) == UNCLEAR


def test_what_grows_in_the_warm_up_alone_does_not_count() -> None:
    grown = [(at, 150 + 20 * min(1.0, at / WARM_UP_S)) for at, _ in series()]
    assert verdict(grown) == FLAT
    assert verdict([(at, 150 + 20 * at / END_S) for at, _ in grown]) == GROWS


def test_a_sawtooth_is_no_growth() -> None:
    assert verdict([(at, 150 + at % 200 / 10) for at, _ in series()]) == FLAT


def test_shrinking_is_no_growth() -> None:
    assert verdict(series(-10.0)) == FLAT


def test_a_slope_is_that_of_the_line() -> None:
    slope = slope_of(series(10.0, noise=0.0), WARM_UP_S, END_S)
    assert slope is not None
    assert slope.per_hour == pytest.approx(10.0)
    assert slope.low == pytest.approx(10.0, abs=0.01)
    assert slope.level == pytest.approx(150 + 10.0 * HOURS * 0.6, abs=0.1)


def test_a_time_without_samples_is_not_judged() -> None:
    gap = [(at, value) for at, value in series(50.0) if not 4000 < at < 5000]
    assert judged(slope_of(gap, WARM_UP_S, END_S), 1.0) == {
        "verdict": UNCLEAR,
        "why": "too few samples",
    }
