"""Pictures drawn without torch are those that models are trained on, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.world.draw import draw
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import WorldConfig
from edge_vlm.world.street import Street
from edge_vlm.world.textures import NUM_BACKGROUNDS, background
from edge_vlm_training.world.backgrounds import background_bank
from edge_vlm_training.world.render import render

MOST_SHARE = 1e-4
"""Of all levels, how many may differ, by one."""


def require_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < MOST_SHARE


@pytest.mark.parametrize("size", [96, 192])
def test_a_clip_is_drawn_alike(size: int) -> None:
    scenes = sample_scenes(11, 6, WorldConfig(num_frames=4, split="heldout", crowded=1.0))
    theirs = render(scenes, size).numpy()
    ours = [[draw(scenes, b, t, size) for t in range(4)] for b in range(6)]
    require_same(np.array(ours), theirs)


def test_a_street_is_drawn_alike() -> None:
    scenes = Street(7).scenes(61.0, 8)
    theirs = render(scenes, 192).numpy()[0]
    require_same(np.array([draw(scenes, 0, t, 192) for t in range(8)]), theirs)
    assert np.array_equal(draw(scenes, 0, 3, 192), Street(7).picture(62.5))


def test_backgrounds_are_alike() -> None:
    bank = background_bank(96).numpy()
    chosen = range(0, NUM_BACKGROUNDS, 4)
    require_same(np.array([background(n, 96) for n in chosen]), bank[list(chosen)])
