"""Footage with event times: what is said to be there is there, and only then."""

from __future__ import annotations

from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import WorldConfig
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.world.heldout_events import ABSENT, heldout_footage


def test_events_are_when_things_can_be_seen() -> None:
    seed, frames = 5, 12
    world = WorldConfig(
        num_frames=frames,
        split="heldout",
        start_at_zero=1.0,
        late_entry=0.8,
        early_leave=0.7,
        crowded=1.0,
    )
    footage = list(heldout_footage(seed, 3, frames))
    assert len(footage) == 3
    num_events = 0
    for number, part in enumerate(footage):
        scenes = sample_scenes(seed * 100_003 + number, 1, world)
        assert list(part.times_s) == [0.5 * t for t in range(frames)]
        present = {KINDS[k]: m for m, k in enumerate(scenes.kind[0].tolist()) if k >= 0}
        told = {watch.question: watch.events for watch in part.watches}
        assert len(told) == len(part.watches) == len(present) + ABSENT
        for question, events in told.items():
            name = question.removeprefix("Is there a ").removesuffix(" now?")
            assert bool(events) == (name in present)
            for t, time_s in enumerate(part.times_s):
                there = name in present and bool(scenes.visible[0, t, present[name]])
                assert there == any(begin <= time_s < end for begin, end in events)
            num_events += len(events)
    assert num_events >= 3


def test_the_same_seed_gives_the_same_footage() -> None:
    first, again = (list(heldout_footage(2, 1, 4)) for _ in range(2))
    assert first == again
    assert first != list(heldout_footage(3, 1, 4))
