"""Scenes: repeatable, free of overlaps, and nothing shared between training and held-out clips."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import pytest

from edge_vlm.world.paths import DIRECTIONS, STILL
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import Scenes, WorldConfig
from edge_vlm.world.splits import Split, allowed_pairs, pair_is_heldout, path_is_heldout

SPLITS: tuple[Split, ...] = ("train", "heldout")


@pytest.fixture(scope="module", params=SPLITS)
def scenes(request: pytest.FixtureRequest) -> Scenes:
    return sample_scenes(3, 400, WorldConfig(split=request.param))


def arrays(scenes: Scenes) -> dict[str, np.ndarray]:
    return {f.name: getattr(scenes, f.name) for f in fields(scenes) if f.name != "fps"}


def test_same_seed_same_scenes() -> None:
    cfg = WorldConfig()
    first, again, other = (arrays(sample_scenes(seed, 20, cfg)) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["x"], other["x"])


@pytest.mark.parametrize(
    ("split", "digest"), [("train", "c55e03dad8c1c25a"), ("heldout", "5522e606894f805e")]
)
def test_seeds_mean_what_they_meant_when_the_weights_were_trained(
    split: Split, digest: str
) -> None:
    scenes = sample_scenes(9, 64, WorldConfig(split=split))
    found = hashlib.sha256()
    whole = ("kind", "colour", "enter", "leave", "direction", "path_key", "background")
    clips = {name: getattr(scenes, name) for name in (*whole, "noise_key", "visible")}
    for name in ("direction", "background"):
        clips[name] = clips[name][:, 0]  # of these clips it is the same in every frame
        assert (getattr(scenes, name) == clips[name][:, None]).all()
    for values in clips.values():
        found.update(values.astype("<i8").tobytes())
    assert found.hexdigest()[:16] == digest


def test_a_seed_means_different_scenes_in_the_two_splits() -> None:
    train, heldout = (sample_scenes(5, 50, WorldConfig(split=split)) for split in SPLITS)
    # drawn without regard to the split, so equal seeds would show here
    assert not np.array_equal(train.times_s, heldout.times_s)
    assert not np.array_equal(train.noise_key, heldout.noise_key)


def test_splits_share_no_pair_and_no_path() -> None:
    pairs, paths = [], []
    for split in SPLITS:
        scenes = sample_scenes(1, 1500, WorldConfig(split=split))
        present = scenes.kind >= 0
        background = np.broadcast_to(scenes.background[:, :1], present.shape)[present]
        heldout = pair_is_heldout(scenes.kind[present], background)
        assert (heldout == (split == "heldout")).all()
        assert (path_is_heldout(scenes.path_key[present]) == (split == "heldout")).all()
        pairs.append(set(zip(scenes.kind[present].tolist(), background.tolist(), strict=True)))
        paths.append(set(scenes.path_key[present].tolist()))
    assert not pairs[0] & pairs[1]
    assert not paths[0] & paths[1]
    assert all(len(side) > 100 for side in (*pairs, *paths))


def test_both_splits_have_every_kind_and_most_backgrounds() -> None:
    for split in SPLITS:
        allowed, backgrounds = allowed_pairs(split)
        assert allowed[backgrounds].any(0).all()
        assert len(backgrounds) > 200


def test_kinds_and_colours_are_distinct_within_a_clip(scenes: Scenes) -> None:
    for b in range(len(scenes)):
        kinds = scenes.kind[b][scenes.kind[b] >= 0]
        assert len(set(kinds)) == len(kinds)
        for t in range(scenes.num_frames):
            colours = scenes.colour[b, t][scenes.kind[b] >= 0]
            assert len(set(colours)) == len(colours)


def test_visible_things_are_inside_and_apart(scenes: Scenes) -> None:
    seen = scenes.visible
    for place in (scenes.x, scenes.y):
        assert (place[seen] > 0.05).all()
        assert (place[seen] < 0.95).all()
    for a in range(seen.shape[2]):
        for b in range(a):
            both = seen[:, :, a] & seen[:, :, b]
            gap = np.maximum(
                abs(scenes.x[:, :, a] - scenes.x[:, :, b]),
                abs(scenes.y[:, :, a] - scenes.y[:, :, b]),
            )
            reach = 0.45 * (scenes.size[:, None, a] + scenes.size[:, None, b])
            assert (gap >= reach)[both].all()


def test_spans_and_motion_agree_with_what_is_visible(scenes: Scenes) -> None:
    now = np.arange(scenes.num_frames)[:, None]
    alive = (now >= scenes.enter[:, None]) & (now < scenes.leave[:, None])
    assert np.array_equal(scenes.visible, alive)
    step = np.stack([np.diff(scenes.x, axis=1), np.diff(scenes.y, axis=1)], -1)
    unit = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])[scenes.direction]
    expected = (unit * scenes.speed[:, None, :, None])[:, 1:]
    both = scenes.visible[:, 1:] & scenes.visible[:, :-1]
    assert np.allclose(step[both], expected[both], atol=1e-5)
    assert ((scenes.speed[:, None] > 0) == (scenes.direction != STILL)).all()


def test_shares_are_those_of_the_configuration() -> None:
    # movers have to leave longer clips
    cfg = WorldConfig(num_frames=8, max_objects=3, gathering=0.0)
    scenes = sample_scenes(0, 2000, cfg)
    present = scenes.kind >= 0
    assert abs((scenes.enter[present] > 0).mean() - cfg.late_entry) < 0.05
    assert abs((scenes.leave[present] < cfg.num_frames).mean() - cfg.early_leave) < 0.05
    shares = np.bincount(scenes.direction[:, 0][present], minlength=len(DIRECTIONS)) / present.sum()
    assert abs(shares[STILL] - (1 - cfg.moving)) < 0.05
    assert (abs(shares[:STILL] - cfg.moving / 4) < 0.04).all()
    changes = (np.diff(scenes.colour, axis=1) != 0).sum(1)[present]
    assert changes.max() == 1
    assert abs(changes.mean() - cfg.colour_change) < 0.03
    assert abs((scenes.times_s[:, 0] == 0).mean() - cfg.start_at_zero) < 0.05
    assert scenes.times_s[:, 0].max() <= cfg.max_start_s
    assert set(present.sum(1)) == {1, 2, 3}


def test_where_things_gather_all_are_there_from_half_time_on() -> None:
    scenes = sample_scenes(4, 200, WorldConfig(gathering=1.0))
    seen, present = scenes.visible, scenes.kind >= 0
    assert np.array_equal(seen[:, 8:], np.broadcast_to(present[:, None], seen[:, 8:].shape))
    assert (scenes.direction[:, 0][present] == STILL).all()
    assert (scenes.enter[present] > 0).any()


def test_full_clips_have_up_to_five_things_in_different_colours() -> None:
    scenes = sample_scenes(4, 500, WorldConfig(crowded=1.0, colour_change=1.0))
    assert scenes.visible.sum(2).max() == 5
    changes = (np.diff(scenes.colour, axis=1) != 0).any(1).sum(1)
    assert changes.max() == 3  # eight colours, five of them in use from the start


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 16, 40])
@pytest.mark.parametrize("split", SPLITS)
def test_other_clip_lengths(split: Split, num_frames: int) -> None:
    scenes = sample_scenes(2, 60, WorldConfig(num_frames=num_frames, split=split))
    seen = scenes.visible
    assert seen.shape == (60, num_frames, 5)
    assert seen.any()
    for place in (scenes.x, scenes.y):
        assert (place[seen] > 0.05).all()
        assert (place[seen] < 0.95).all()
    assert scenes.times_s.shape == (60, num_frames)


def test_select_takes_whole_clips(scenes: Scenes) -> None:
    some = scenes.select(np.array([7, 2]))
    assert len(some) == 2
    assert np.array_equal(some.visible, scenes.visible[[7, 2]])
    assert np.array_equal(some.times_s, scenes.times_s[[7, 2]])


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_frames", 0), ("fps", 0.0), ("max_objects", 6), ("split", "test"), ("moving", 1.5)],
)
def test_bad_configuration_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        WorldConfig(**{field: value})  # type: ignore[arg-type]
