"""Questions about what is not there but looks like what is: false alarms come from these."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from edge_vlm.world.questions import Question
from edge_vlm.world.scenes import Scenes
from edge_vlm.world.sprites import KINDS, SPRITE_SIDE, load_atlas

_ALIKE = 8
_POINTS = 16
"""Sprites are compared on so many points a side, which is more than a thing in a picture has."""
_YES_SHARE = 1 / 3


@lru_cache(maxsize=1)
def look_alikes() -> tuple[tuple[int, ...], ...]:
    """Of each kind the eight others that look most like it, from the most alike on."""
    atlas = load_atlas().astype(np.float32)
    block = SPRITE_SIDE // _POINTS
    blocks = atlas.prod(-1).reshape(len(KINDS), _POINTS, block, _POINTS, block)
    looks = blocks.mean((2, 4)).reshape(len(KINDS), -1)
    looks -= looks.mean(0)
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    alike = looks @ looks.T
    np.fill_diagonal(alike, -np.inf)
    return tuple(tuple(row[:_ALIKE].tolist()) for row in np.argsort(-alike, axis=1))


def ask_look_alike(scenes: Scenes, b: int, t: int, rng: random.Random) -> Question | None:
    """Whether clip `b` shows, after frame `t`, what looks like one of the things that are there, or
    in a third of all cases that thing itself. None where nothing is there."""
    here = np.flatnonzero(scenes.visible[b, t]).tolist()
    if not here:
        return None
    thing: int | None = rng.choice(here)
    kinds = {int(kind) for kind in scenes.kind[b, here]}
    kind = int(scenes.kind[b, thing])
    if rng.random() >= _YES_SHARE:
        others = [other for other in look_alikes()[kind] if other not in kinds]
        kind, thing = rng.choice(others), None  # five things at most are there
    answer = "no" if thing is None else "yes"
    text = f"Is there a {KINDS[kind]} now?"
    return Question("presence", text, answer, t, {"object": thing})
