"""Sampling draws what it says it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_vlm_runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.05, 0.6, 0.3, 0.05], np.float32))


def _draws(sampling: Sampling, number: int = 400) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.sample(LOGITS) for _ in range(number)]


def test_greedy_takes_the_likeliest() -> None:
    assert set(_draws(Sampling(), 5)) == {1}


def test_temperature_follows_the_probabilities() -> None:
    counts = np.bincount(_draws(Sampling(temperature=1, seed=0), 4000), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.05, 0.6, 0.3, 0.05], atol=0.03)


def test_top_p_never_draws_the_tail() -> None:
    assert set(_draws(Sampling(temperature=1, top_p=0.7, seed=0))) == {1, 2}
    assert set(_draws(Sampling(temperature=1, top_p=0.5, seed=0))) == {1}


def test_a_seed_repeats_the_answer() -> None:
    sampling = Sampling(temperature=1, seed=7)
    assert _draws(sampling) == _draws(sampling)


def test_the_penalty_moves_on_and_leaves_the_logits_alone() -> None:
    before = LOGITS.copy()
    assert _draws(Sampling(frequency_penalty=1.0), 3) == [1, 2, 1]
    assert (before == LOGITS).all()


@pytest.mark.parametrize(
    "fields", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"frequency_penalty": 3}]
)
def test_settings_outside_their_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
