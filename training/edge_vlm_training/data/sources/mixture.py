"""Several sources as one, in given proportions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from edge_vlm_training.data.sample import Sample, Source, seed_of


@dataclasses.dataclass(frozen=True)
class Share:
    """A source and its weight; weights need not add up to 1."""

    source: Source
    weight: float


class Mixture:
    """Draws sources by weight; the same seed gives the same draws.

    The stream is dealt out to `lanes`: each takes every so many-th sample of a source, so that all
    lanes together go through a source's samples once, however many processes they run in.
    """

    def __init__(self, shares: Sequence[Share], *, seed: int) -> None:
        """Raises ValueError without sources, for a weight that is not positive, or a name twice."""
        names = [share.source.name for share in shares]
        if not shares:
            raise ValueError("a mixture needs at least one source")
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, got {names}")
        for share in shares:
            if not share.weight > 0:
                raise ValueError(
                    f"weight of {share.source.name} must be positive, got {share.weight}"
                )
        self.seed = seed
        self._weights = [share.weight for share in shares]
        self._sources = {share.source.name: share.source for share in shares}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def choose(self, lane: int, draw: int) -> str:
        """Name of the source that draw number `draw` of a lane takes."""
        rng = random.Random(seed_of("mixture", self.seed, lane, draw))
        return rng.choices(self.names, self._weights)[0]

    def sample(self, name: str, number: int) -> Sample:
        """Sample `number` of a source; raises as the source does."""
        return self._sources[name].sample(number)
