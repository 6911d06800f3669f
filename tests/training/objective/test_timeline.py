"""Timeline labels tell what was shown of a thing's past, and nothing that was not."""

from __future__ import annotations

import numpy as np
import torch

from edge_vlm.world.paths import STILL
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import Scenes, WorldConfig
from edge_vlm_training.objective.probes.dense import CELL_COVERED, things_at
from edge_vlm_training.objective.probes.timeline import UNKNOWN, Timeline, timeline, timeline_loss
from edge_vlm_training.world.render import render_with_owner

GRID = 4


def _labelled(forgotten: int) -> tuple[Scenes, torch.Tensor, Timeline]:
    scenes = sample_scenes(11, 6, WorldConfig(num_frames=6, crowded=1.0))
    owner = render_with_owner(scenes)[1]
    thing, empty = things_at(owner, scenes.kind.shape[1], GRID, CELL_COVERED)
    story = timeline(scenes, owner, GRID, CELL_COVERED, forgotten)
    return scenes, thing.masked_fill(empty, -1), story


def test_labels_say_when_a_thing_came_and_how_far_it_went() -> None:
    scenes, thing, story = _labelled(forgotten=0)
    times, told = scenes.times_s, 0
    for place, m in enumerate(thing.flatten().tolist()):
        heading, tens, ones, tenths = story.classes[place].tolist()
        if m < 0:
            assert heading == tens == ones == tenths == UNKNOWN
            continue
        clip, frame = place // GRID**2 // 6, place // GRID**2 % 6
        first = scenes.enter[clip, m]
        assert f"{'' if tens == 10 else tens}{ones}.{tenths}" == f"{times[clip, first]:.1f}"
        if frame == first:
            assert heading == UNKNOWN
            continue
        told += 1
        assert heading == scenes.direction[clip, frame, m]
        way = story.travel[place].numpy()
        assert (np.abs(way).max() < 1e-6) == (heading == STILL)
        np.testing.assert_allclose(way[0], scenes.x[clip, frame, m] - scenes.x[clip, first, m])
    assert told > 50


def test_what_happened_in_forgotten_frames_is_unknown() -> None:
    scenes, thing, story = _labelled(forgotten=2)
    hidden = 0
    for place, m in enumerate(thing.flatten().tolist()):
        if m >= 0 and 0 < scenes.enter[place // GRID**2 // 6, m] <= 2:
            hidden += 1
            assert story.classes[place, 1:].tolist() == [UNKNOWN] * 3
    assert hidden > 5


def test_perfect_outputs_cost_nothing() -> None:
    _, _, story = _labelled(forgotten=0)
    sizes = (5, 11, 10, 10)
    perfect = [
        50.0 * torch.nn.functional.one_hot(label.clamp(min=0), size)
        for label, size in zip(story.classes.unbind(-1), sizes, strict=True)
    ]
    loss, metrics = timeline_loss((*perfect, story.travel), story)
    assert loss.item() < 1e-4
    assert metrics == {"heading": 1.0, "appeared": 1.0, "travel_rms": 0.0}
    wrong, _ = timeline_loss((perfect[0].roll(1, -1), *perfect[1:], story.travel), story)
    assert wrong.item() > 1.0
