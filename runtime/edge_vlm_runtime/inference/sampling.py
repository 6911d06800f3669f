"""From logits to one token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Greedy unless `temperature` is above 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Smallest set of likeliest tokens with this much probability; the rest is never drawn."""
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"Sampling.temperature = {self.temperature}: must lie in 0..10")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p = {self.top_p}: must lie in (0, 1]")


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def sample(self, logits: np.ndarray) -> int:
        """One token id from finite logits f32 [V]."""
        return int(logits.argmax()) if self._sampling.temperature == 0 else self._draw(logits)

    def _draw(self, logits: np.ndarray) -> int:
        below_best = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # at a temperature near 0 the others are infinitely far
            probability = np.exp(below_best / self._sampling.temperature)
        probability /= probability.sum()
        if self._sampling.top_p < 1:
            order = np.argsort(-probability, kind="stable")
            before = np.cumsum(probability[order]) - probability[order]
            probability[order[before >= self._sampling.top_p]] = 0
            probability /= probability.sum()
        return int(self._rng.choice(len(probability), p=probability))
