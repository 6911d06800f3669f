"""The endless street: the same for everybody, at any moment, and as the world's clips are."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from edge_vlm.world import street_traffic
from edge_vlm.world.paths import APART, DIRECTIONS, EDGE, MAX_SIDE, MIN_SIDE, STEPS, STILL
from edge_vlm.world.questions import ask
from edge_vlm.world.scenes import Scenes
from edge_vlm.world.sprites import KINDS
from edge_vlm.world.street import MOST_SEED, MOST_TIME_S, Street
from edge_vlm.world.street_traffic import MINUTE, STEP_S, Thing
from edge_vlm.world.textures import GRID

SECONDS = 6 * MINUTE * STEP_S
SEEDS = (0, 7, MOST_SEED)


@pytest.fixture(scope="module", params=SEEDS)
def scenes(request: pytest.FixtureRequest) -> Scenes:
    return Street(request.param).scenes(0.0, round(SECONDS / STEP_S))


def test_a_moment_is_the_same_whoever_asks_and_whatever_was_asked_before() -> None:
    first = Street(7).picture(130.5)
    street_traffic.traffic.cache_clear()
    street_traffic.keeper.cache_clear()
    other = Street(7)
    other.picture(3.0)
    assert np.array_equal(first, other.picture(130.5))
    assert first.shape == (192, 192, 3)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, Street(8).picture(130.5))
    assert not np.array_equal(first, other.picture(131.0))


def test_a_seed_is_the_same_street_everywhere() -> None:
    street = Street(7)
    assert street.seen(0.0) == [("yellow", "clock")]
    assert street.seen(99.5) == [("blue", "snowman"), ("purple", "tree")]
    assert street.seen(86_400.0) == [("blue", "diamond")]


def test_one_to_five_things_of_different_kinds_and_colours(scenes: Scenes) -> None:
    counts = scenes.visible[0].sum(1)
    assert counts.min() >= 1
    assert {1, 2, 3, 4} <= set(counts.tolist()) <= {1, 2, 3, 4, 5}
    for frame, seen in enumerate(scenes.visible[0]):
        for values in (scenes.kind[0][seen], scenes.colour[0, frame][seen]):
            assert len(set(values.tolist())) == seen.sum()


def test_things_are_inside_and_keep_clear_of_each_other(scenes: Scenes) -> None:
    seen, place = scenes.visible[0], np.stack([scenes.x, scenes.y], -1)[0]
    assert (np.abs(place[seen] - 0.5) <= 0.5 - (EDGE - 0.5) / GRID + 1e-5).all()
    for one in range(seen.shape[1]):
        for other in range(one):
            both = seen[:, one] & seen[:, other]
            gap = np.abs(place[both, one] - place[both, other]).max(-1)
            assert (gap >= APART * (scenes.size[0, one] + scenes.size[0, other]) - 1e-5).all()


def test_things_walk_in_stay_and_walk_out() -> None:
    things = [thing for seed in SEEDS for thing in Street(seed).things(0.0, SECONDS)]
    assert {thing.kind for thing in things} == set(range(len(KINDS)))
    assert {thing.side for thing in things} == set(range(MIN_SIDE, MAX_SIDE + 1))
    stays = [thing.leave - thing.enter for thing in things]
    assert min(stays) >= 6
    assert max(stays) > 40
    moves = [np.abs(np.diff(thing.track, axis=0)).sum(1) for thing in things]
    assert any((each == 0).all() for each in moves)
    assert any((each > 0).all() for each in moves)
    assert any(each[0] > 0 and each[-1] > 0 and (each == 0).any() for each in moves)


def test_no_kind_comes_back_within_its_own_and_the_next_minute() -> None:
    things = Street(3).things(0.0, 20 * MINUTE * STEP_S)
    for kind in range(len(KINDS)):
        times = [(thing.enter, thing.leave) for thing in things if thing.kind == kind]
        for (_, left), (came, _) in itertools.pairwise(times):
            assert came - left >= MINUTE - 2 * 24


def test_any_moment_agrees_with_the_whole(scenes: Scenes) -> None:
    """Also where a minute ends."""
    for seed in SEEDS:
        street = Street(seed)
        whole = street.scenes(0.0, 300)
        for frame in (0, 1, 100, MINUTE - 1, MINUTE, MINUTE + 1, 299):
            one = street.scenes(frame * STEP_S, 1)
            seen = whole.visible[0, frame]
            assert whole.kind[0][seen].tolist() == one.kind[0].tolist()
            assert whole.x[0, frame][seen].tolist() == one.x[0, 0].tolist()
            assert whole.noise_key[0, frame] == one.noise_key[0, 0]
            said = ", ".join(f"{colour} {name}" for colour, name in street.seen(frame * STEP_S))
            caption = ask(whole, 0, "caption", frame, random.Random(0))
            assert caption is not None
            assert said == caption.answer


def test_between_two_steps_things_are_on_their_way() -> None:
    street = Street(0)
    thing = next(each for each in street.things(0, 60) if each.direction(each.enter + 2) != STILL)
    begin_s = (thing.enter + 1) * STEP_S
    at = street.scenes(begin_s, 3, fps=4.0)
    index = at.kind[0].tolist().index(thing.kind)
    middle = (at.x[0, 0, index] + at.x[0, 2, index]) / 2
    assert at.x[0, 1, index] == pytest.approx(middle)
    assert at.times_s[0].tolist() == [begin_s, begin_s + 0.25, begin_s + 0.5]


def test_a_direction_is_that_of_the_last_three_steps() -> None:
    told = set()
    for thing in Street(5).things(0.0, SECONDS):
        for step in range(thing.enter, thing.leave):
            way = thing.direction(step)
            if step < thing.enter + 2:
                assert way is None
                continue
            moved = _moved(thing, step)
            if way is None:
                assert (np.sign(moved[0]) != np.sign(moved[1])).any()
            else:
                assert (np.sign(moved) == STEPS[way]).all()
                told.add(way)
        assert thing.direction(thing.leave) is None
    assert told == set(range(len(DIRECTIONS)))


def _moved(thing: Thing, step: int) -> np.ndarray:
    last = step - thing.enter
    return np.diff(thing.track[last - 2 : last + 1], axis=0)


@pytest.mark.parametrize("seed", [-1, MOST_SEED + 1])
def test_seeds_beyond_the_range(seed: int) -> None:
    with pytest.raises(ValueError, match="seed of a street"):
        Street(seed)


@pytest.mark.parametrize("time_s", [-0.5, 2 * MOST_TIME_S, float("nan")])
def test_times_beyond_the_range(time_s: float) -> None:
    with pytest.raises(ValueError, match="street's time"):
        Street(0).scenes(time_s, 1)


def test_a_street_is_there_after_years() -> None:
    assert Street(1).picture(MOST_TIME_S - 1).std() > 5
    assert 1 <= len(Street(1).seen(MOST_TIME_S - 1)) <= 5
