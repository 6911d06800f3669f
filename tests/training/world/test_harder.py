"""The harder world shows what it says, and its splits are kept apart."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch

from edge_vlm.world.draw import draw
from edge_vlm.world.harder import harder
from edge_vlm.world.paths import MAX_SIDE, SMALLEST_SIDE
from edge_vlm.world.questions import ask, event_time
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import UNCLEAR, Scenes, WorldConfig
from edge_vlm.world.splits import pair_is_heldout
from edge_vlm.world.textures import GRID, WIDE_BACKGROUNDS
from edge_vlm_training.world.heldout import ALERT, heldout_clips
from edge_vlm_training.world.render import render, render_with_owner

CLIPS = 60


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(3, CLIPS, harder(WorldConfig(crowded=0.5)))


def test_a_seed_means_the_same_clips_and_the_splits_share_no_pair(scenes: Scenes) -> None:
    again = sample_scenes(3, CLIPS, harder(WorldConfig(crowded=0.5)))
    assert np.array_equal(again.x, scenes.x)
    assert np.array_equal(again.background, scenes.background)
    for split in ("train", "heldout"):
        world = harder(WorldConfig(split=split))
        found = sample_scenes(3, CLIPS, world)
        shown = found.visible
        kinds = np.broadcast_to(found.kind[:, None], shown.shape)[shown]
        backgrounds = np.broadcast_to(found.background[..., None], shown.shape)[shown]
        assert (pair_is_heldout(kinds, backgrounds) == (split == "heldout")).all()
        assert set(backgrounds.tolist()) <= set(WIDE_BACKGROUNDS)


def test_it_has_all_that_makes_it_harder(scenes: Scenes) -> None:
    shown = scenes.visible
    sides = np.rint(scenes.size[shown.any(1)] * GRID)
    assert (sides < 18).sum() > 20
    assert sides.min() >= SMALLEST_SIDE
    assert (sides > 22).sum() > 20
    assert sides.max() <= MAX_SIDE
    assert (shown.sum(1)[shown.any(1)] <= 3).mean() > 0.2
    assert 0.05 < (scenes.brightness < 0.6).all(1).mean() < 0.4
    assert 0.05 < (scenes.pan != 0).any((1, 2)).mean() < 0.5
    assert 0.05 < (np.diff(scenes.background, axis=1) != 0).any(1).mean() < 0.4
    assert (scenes.direction == UNCLEAR).any()


def test_spans_are_those_of_what_is_seen(scenes: Scenes) -> None:
    for clip, thing in zip(*np.nonzero(scenes.kind >= 0), strict=True):
        (seen,) = np.nonzero(scenes.visible[clip, :, thing])
        assert (seen[0], seen[-1] + 1) == (scenes.enter[clip, thing], scenes.leave[clip, thing])
    assert not scenes.visible.transpose(0, 2, 1)[scenes.kind < 0].any()


def test_things_and_background_move_together_when_the_camera_turns() -> None:
    world = WorldConfig(panning=1.0, moving=0.0, num_frames=6)
    scenes = sample_scenes(5, 40, world)
    step, turn = np.diff(scenes.x, axis=1), np.diff(scenes.pan[..., 0], axis=1)
    both = scenes.visible[:, 1:] & scenes.visible[:, :-1]
    expected = np.broadcast_to(turn[..., None], both.shape)
    np.testing.assert_allclose(step[both], expected[both], atol=1e-5)
    turning = (np.diff(scenes.pan, axis=1) != 0).any(2)
    assert (scenes.direction[:, 1:][turning] == UNCLEAR).all()
    rng = random.Random(1)
    asked = 0
    for clip, frame in np.ndindex(40, 6):
        question = ask(scenes, clip, "direction", frame, rng)
        if question is not None:
            asked += 1
            assert not turning[clip, max(0, frame - 2) : frame].any()
    assert asked > 0


def test_pictures_show_what_is_there(scenes: Scenes) -> None:
    few = scenes.select(slice(0, 12))
    frames, owner = render_with_owner(few)
    for clip, frame in np.ndindex(12, few.num_frames):
        there = set(owner[clip, frame].unique().tolist()) - {-1}
        seen = set(np.flatnonzero(few.visible[clip, frame]).tolist())
        assert there <= seen  # who stands behind another may be hidden
    assert torch.equal(frames, render(few))
    for clip, frame in ((0, 0), (5, 8), (11, 15)):
        other = draw(few, clip, frame, 96).astype(int)
        assert np.abs(other - frames[clip, frame].numpy()).max() <= 1


def test_of_two_of_a_kind_on_both_sides_of_a_cut_it_is_not_known_when_the_second_appeared() -> None:
    scenes = sample_scenes(0, 200, WorldConfig(num_frames=6, crowded=1.0, cuts=1.0))
    slots, rng, found, told = scenes.kind.shape[1] // 2, random.Random(0), 0, 0
    for clip in range(len(scenes)):
        kind, visible = scenes.kind[clip], scenes.visible[clip]
        at = int(np.flatnonzero(np.diff(scenes.background[clip]))[0]) + 1
        for thing in range(slots, 2 * slots):
            others = (kind[:slots] == kind[thing]) & visible[at - 1, :slots]
            if visible[at, thing] and others.any():
                found += 1
                asked = [ask(scenes, clip, "when", 5, rng) for _ in range(20)]
                answers = {when.answer for when in asked if when and when.meta["object"] == thing}
                assert answers <= {event_time(scenes.times_s[clip, at], told=False)}
                told += len(answers)
    assert told > 3
    assert found > 3


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_clips_of_it_may_be_short(frames: int) -> None:
    scenes = sample_scenes(3, 60, harder(WorldConfig(num_frames=frames)))
    assert scenes.visible.any()
    assert (np.diff(scenes.background, axis=1) != 0).any() == (frames == 4)


def test_heldout_clips_of_it_can_be_asked_about() -> None:
    clips = list(islice(heldout_clips(3, 1000, kinds=("when", ALERT), is_harder=True), 5))
    assert {question.kind for clip in clips for question in clip.questions} == {"when", ALERT}
