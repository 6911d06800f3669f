"""What a session holds of a stream: the first frame, a gap, frames that show something new."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter

import numpy as np
import pytest

from edge_vlm.world.questions import ask
from edge_vlm.world.scenes import Scenes
from edge_vlm.world.splits import MOST_THINGS, pair_is_heldout
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.world.render import render
from edge_vlm_training.world.streams import stream_scenes

CLIPS, FRAMES, EVICTED, MOST_S = 12, 14, 3, 30.0


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return stream_scenes(np.random.default_rng(4), CLIPS, FRAMES, EVICTED, MOST_S)


def test_a_seed_means_the_same_streams(scenes: Scenes) -> None:
    again = stream_scenes(np.random.default_rng(4), CLIPS, FRAMES, EVICTED, MOST_S)
    for field in dataclasses.fields(Scenes):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(scenes, field.name))
    assert render(scenes, 24).shape == (CLIPS, FRAMES, 24, 24, 3)


def test_stamps_begin_with_the_session_and_stay_inside(scenes: Scenes) -> None:
    times = scenes.times_s
    assert (times[:, 0] == 0).all()
    assert times.max() <= MOST_S
    shown = times[:, EVICTED + 1 :]
    assert shown.min() >= 0.5
    steps = np.diff(shown, axis=1)
    assert steps.min() == 0.5
    assert steps.max() > 1  # frames that show nothing new are missing
    assert steps.max() <= 10
    assert len(set(shown[:, 0].tolist())) > CLIPS // 2


def test_without_a_gap_nothing_is_forgotten() -> None:
    scenes = stream_scenes(np.random.default_rng(5), CLIPS, FRAMES, 0, MOST_S)
    assert scenes.told.all()
    assert (scenes.times_s[:, 1] == 0.5).all()


def test_people_of_heldout_clips_stay_away(scenes: Scenes) -> None:
    present = scenes.kind >= 0
    backgrounds = np.broadcast_to(scenes.background[:, :1], present.shape)
    assert not pair_is_heldout(scenes.kind[present], backgrounds[present]).any()
    assert not scenes.visible[~np.repeat(present[:, None], FRAMES, 1)].any()
    assert 2 < scenes.visible.sum(2).max() <= MOST_THINGS


def test_things_are_there_from_their_first_frame_on(scenes: Scenes) -> None:
    now = np.arange(FRAMES)[:, None]
    alive = (now >= scenes.enter[:, None]) & (now < scenes.leave[:, None])
    alive &= (scenes.kind >= 0)[:, None]
    shown = [0, *range(EVICTED + 1, FRAMES)]
    np.testing.assert_array_equal(scenes.visible[:, shown], alive[:, shown])
    assert scenes.visible[:, 1 : EVICTED + 1].any()  # the scorer compares with these


def test_what_came_unseen_has_no_time(scenes: Scenes) -> None:
    present = scenes.kind >= 0
    oldest = EVICTED + 1
    unseen = present & ~scenes.visible[:, 0] & scenes.visible[:, oldest]
    assert unseen.sum() > 3
    assert not scenes.told[unseen].any()
    assert (scenes.enter[unseen] == oldest).all()
    seen = present & (scenes.visible[:, 0] | (scenes.enter > oldest)) & (scenes.enter < FRAMES)
    assert scenes.told[seen].all()
    rng = random.Random(0)
    answers: Counter[str] = Counter()
    for clip, frame in np.ndindex(CLIPS, FRAMES):
        for _ in range(4):
            question = ask(scenes, clip, "when", frame, rng)
            if question is not None:
                thing = question.meta["object"]
                told = scenes.told[clip, thing]
                first = oldest if not told else scenes.enter[clip, thing]
                word = "at" if told else "by"
                answers[word] += 1
                assert question.answer == f"{word} {scenes.times_s[clip, first]:.1f} s"
                assert scenes.visible[clip, first, thing]
    assert answers["at"] > 100
    assert answers["by"] > 10


def shown_first(scenes: Scenes, clip: int, name: str, frame: int) -> int | None:
    """The first frame up to `frame`, of those a session has, in which one of this name is."""
    alike = scenes.kind[clip] == KINDS.index(name)
    shown = [0, *range(EVICTED + 1, frame + 1)]
    return next((t for t in shown if scenes.visible[clip, t, alike].any()), None)


def test_what_was_forgotten_is_not_needed_for_any_answer(scenes: Scenes) -> None:
    rng = random.Random(1)
    ways, orders = 0, 0
    for clip, frame in np.ndindex(CLIPS, FRAMES):
        for _ in range(6 if frame > EVICTED else 0):
            way = ask(scenes, clip, "direction", frame, rng)
            if way is not None:
                ways += 1
                assert frame - 2 > EVICTED
                assert scenes.visible[clip, frame - 2 : frame + 1, way.meta["object"]].all()
            order = ask(scenes, clip, "order", frame, rng)
            if order is not None:
                orders += 1
                first, second = re.findall("the ([a-z ]+?)(?: or|[?])", order.text)
                came = {name: shown_first(scenes, clip, name, frame) for name in (first, second)}
                other = second if order.answer == first else first
                assert came[order.answer] is not None
                assert came[other] is not None
                assert came[order.answer] < came[other]  # type: ignore[operator]
    assert ways > 20
    assert orders > 100


def test_a_name_means_who_came_last() -> None:
    """A cat that was there in the first frame and another one that came while nobody looked, then
    a third that was seen to come."""
    scenes = stream_scenes(np.random.default_rng(4), 1, 6, 2, MOST_S)

    def cut(values: list[list[int]]) -> np.ndarray:
        return np.array(values)

    made = {
        **{"kind": cut([[3, 3, 7]]), "enter": cut([[0, 3, 4]]), "leave": cut([[1, 6, 6]])},
        "told": np.array([[True, False, True]]),
    }
    things = {
        name: np.repeat(getattr(scenes, name)[..., :1], 3, -1)
        for name in ("colour", "x", "y", "direction", "size", "speed", "path_key")
    }
    now = np.arange(6)[:, None]
    visible = (now >= made["enter"][:, None]) & (now < made["leave"][:, None])
    scenes = dataclasses.replace(scenes, **things, **made, visible=visible)
    rng = random.Random(0)
    for _ in range(40):
        when = ask(scenes, 0, "when", 5, rng)
        if when is not None:
            thing = when.meta["object"]
            assert thing in (1, 2)
            assert when.answer.startswith("at " if thing == 2 else "by ")  # seen to come or not
        order = ask(scenes, 0, "order", 5, rng)
        assert order is not None
        assert order.answer == KINDS[3]  # whichever of the two
        presence = ask(scenes, 0, "presence", 5, rng)
        assert presence is not None
        thing = presence.meta["object"]
        assert (presence.answer == "yes") == (thing in (1, 2))
