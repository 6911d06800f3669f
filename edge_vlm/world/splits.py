"""What belongs to training and what to held-out clips: seeds, (kind, background) pairs and paths.

Pairs and paths are hashed, and one hash in five belongs to the held-out side only, so that the two
sides have nothing in common however many clips are drawn.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_vlm.world.sprites import KINDS
from edge_vlm.world.textures import NUM_BACKGROUNDS, WIDE_BACKGROUNDS

Split = Literal["train", "heldout"]
SEED_SPACE: dict[str, int] = {"train": 1, "heldout": 2}
HELDOUT_SHARE = 5  # one in so many
MOST_THINGS = 5  # in one clip

_PAIR_SALT, _PATH_SALT = 0x5EED_0001, 0x5EED_0002
_KINDS_A_PAGE = 32
"""Pairs are numbered so that more kinds leave the side of the earlier ones' pairs as it is: weights
trained on fewer kinds have seen no held-out pair."""

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def _hash(value: npt.NDArray[np.integer], salt: int) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: neighbouring numbers get unrelated hashes."""
    with np.errstate(over="ignore"):
        z = value.astype(np.uint64) + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _is_drawn(hashed: npt.NDArray[np.uint64]) -> BoolArray:
    drawn: BoolArray = hashed % np.uint64(HELDOUT_SHARE) == 0
    return drawn


def pair_is_heldout(kind: npt.ArrayLike, background: npt.ArrayLike) -> BoolArray:
    """Whether this kind on this background is shown in held-out clips only (arrays broadcast)."""
    page, place = np.divmod(np.asarray(kind, np.int64), _KINDS_A_PAGE)
    pair = (page << 20) + np.asarray(background, np.int64) * _KINDS_A_PAGE + place
    return _is_drawn(_hash(pair, _PAIR_SALT))


def path_is_heldout(path_key: npt.ArrayLike) -> BoolArray:
    """Whether things follow this discretised path in held-out clips only."""
    return _is_drawn(_hash(np.asarray(path_key, np.int64), _PATH_SALT))


@lru_cache(maxsize=4)
def allowed_pairs(split: Split, *, wide: bool = False) -> tuple[BoolArray, IntArray]:
    """Pairs of this split, bool [all backgrounds, kinds]; numbers of those backgrounds, narrow or
    wide, that have kinds enough for a clip."""
    numbers = np.arange(WIDE_BACKGROUNDS.stop)
    heldout = pair_is_heldout(np.arange(len(KINDS)), numbers[:, None])
    allowed = heldout if split == "heldout" else ~heldout
    fits = (allowed.sum(1) >= MOST_THINGS) & ((numbers >= NUM_BACKGROUNDS) == wide)
    return allowed, np.flatnonzero(fits)
