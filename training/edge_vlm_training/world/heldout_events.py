"""Held-out footage of the rendered world with the times at which things come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator

from edge_vlm.formats.alert_set import Footage, LabelledAlert
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.world.scenes import Scenes, WorldConfig
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.world.heldout import PICTURE_SIZE
from edge_vlm_training.world.render import draw_batch

ABSENT = 3
"""Things that are watched for in each stretch of footage and never come."""


def heldout_footage(seed: int, count: int, num_frames: int = 48) -> Iterator[Footage]:
    """`count` stretches of footage at two pictures a second, each in front of one background.

    Every thing that comes is watched for, and `ABSENT` others that do not.
    """
    rng = random.Random(seed)
    world = WorldConfig(
        num_frames=num_frames,
        split="heldout",
        start_at_zero=1.0,  # as a session does
        late_entry=0.8,
        early_leave=0.7,
        crowded=1.0,
    )
    for number in range(count):
        frames, scenes = draw_batch(seed * 100_003 + number, 1, world, PICTURE_SIZE)
        yield Footage(
            name=f"{number:05d}",
            jpegs=[encode_jpeg(picture) for picture in frames[0].numpy()],
            times_s=scenes.times_s[0].tolist(),
            watches=_watches(scenes, world.fps, rng),
        )


def _watches(scenes: Scenes, fps: float, rng: random.Random) -> list[LabelledAlert]:
    kinds = scenes.kind[0].tolist()
    watches = []
    for thing, kind in enumerate(kinds):
        if kind >= 0:
            begin, end = int(scenes.enter[0, thing]), int(scenes.leave[0, thing])
            watches.append(_watch(kind, [(begin / fps, end / fps)]))
    absent = [kind for kind in range(len(KINDS)) if kind not in kinds]
    watches += [_watch(kind, []) for kind in rng.sample(absent, ABSENT)]
    return watches


def _watch(kind: int, events: list[tuple[float, float]]) -> LabelledAlert:
    return LabelledAlert(question=f"Is there a {KINDS[kind]} now?", events=events)
