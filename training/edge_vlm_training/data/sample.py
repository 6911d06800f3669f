"""A clip with what is asked about it, before any token: what every source of data gives."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

LAST = -1
"""Frame of a branch that sees the whole clip."""

Pictures = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One annotation of a clip: a question after frame `frame` and the answer to learn.

    The turns of `history` come before the question and are not trained on.
    """

    kind: str
    question: str
    answer: str
    frame: int = LAST
    history: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A clip and its branches. Pictures are made only when a batch needs them."""

    name: str
    """Says in messages where it comes from, as `train.jsonl:3`."""
    times_s: npt.NDArray[np.float64]
    """When each frame is shown, in seconds from the clip's start."""
    branches: tuple[Branch, ...]
    load: Callable[[int], Pictures]
    """Side of the model's input -> u8 [T, side, side, 3]. Raises VideoError."""

    def __post_init__(self) -> None:
        if not len(self.times_s):
            raise ValueError(f"{self.name}: a clip has at least one frame")
        if not self.branches:
            raise ValueError(f"{self.name}: a clip has at least one branch")
        for branch in self.branches:
            if not LAST <= branch.frame < len(self.times_s):
                raise ValueError(
                    f"{self.name}: a branch after frame {branch.frame} of {len(self.times_s)}"
                )


class Source(Protocol):
    """Samples by number: endless, and the same sample for the same number in any process."""

    @property
    def name(self) -> str: ...

    def sample(self, number: int) -> Sample:
        """Raises VideoError or DataError naming the record if this one cannot be had."""
        ...


def draw_reuse(thresholds: Sequence[float], num_clips: int, *name: int | str) -> tuple[float, ...]:
    """One of the thresholds for each clip of what is named, or none where there is nothing to
    draw, so that nothing else is drawn differently."""
    if not any(thresholds):
        return ()
    return tuple(random.Random(seed_of("reuse", *name)).choices(thresholds, k=num_clips))


def seed_of(*parts: int | str) -> int:
    """A seed of 40 bits from what names a draw; unrelated for different names, same everywhere."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=5).digest(), "big")
