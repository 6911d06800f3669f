"""Sampling draws what it says it draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edge_vlm_runtime.inference.sampling import Sampler, Sampling

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


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.3, 1.0), (1.0, 0.9), (1.7, 1.0), (1.7, 0.75)]
)
def test_draws_follow_probabilities_worked_out_token_by_token(
    temperature: float, top_p: float
) -> None:
    logits = np.random.default_rng(0).normal(0, 2, 12).astype(np.float32)
    weights = [math.exp(float(logit) / temperature) for logit in logits]
    expected = [0.0] * len(weights)
    kept = 0.0
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if kept >= top_p:
            break
        expected[token] = weights[token]
        kept += weights[token] / sum(weights)
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=3))
    draws = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=12)
    np.testing.assert_allclose(draws / 20_000, np.array(expected) / sum(expected), atol=0.015)
    assert all(count == 0 for count, share in zip(draws, expected, strict=True) if share == 0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert set(_draws(Sampling(temperature=temperature, seed=0), 5)) == {1}


def test_a_seed_repeats_the_answer() -> None:
    sampling = Sampling(temperature=1, seed=7)
    assert _draws(sampling) == _draws(sampling)


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_settings_outside_their_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
