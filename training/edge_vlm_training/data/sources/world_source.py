"""The rendered world as a source of samples: a new clip for every number."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np

from edge_vlm.world.questions import ask_any
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import WorldConfig
from edge_vlm_training.data.sample import LAST, Branch, Pictures, Sample, seed_of
from edge_vlm_training.world.render import render


class WorldSource:
    """Clips of `num_frames` (one of them, drawn) with `branches` questions each.

    Questions come after random frames, or all at the clip's end (`at_end`): a model whose vision
    tokens see later frames (`VisionAttention.ALL`) can only learn from these. `kinds` weighs the
    kinds of question, equally by default.
    """

    def __init__(
        self,
        world: WorldConfig,
        *,
        seed: int,
        num_frames: Sequence[int] = (8,),
        branches: int = 8,
        at_end: bool = False,
        kinds: Mapping[str, float] | None = None,
        name: str = "world",
    ) -> None:
        if not num_frames or min(num_frames) < 1:
            raise ValueError(f"num_frames must be positive numbers, got {list(num_frames)}")
        if branches < 1:
            raise ValueError(f"branches must be at least 1, got {branches}")
        self._world, self._seed, self._name = world, seed, name
        self._num_frames, self._branches = tuple(num_frames), branches
        self._at_end, self._kinds = at_end, kinds

    @property
    def name(self) -> str:
        return self._name

    def sample(self, number: int) -> Sample:
        seed = seed_of("world", self._name, self._seed, number)
        rng = random.Random(seed)
        world = dataclasses.replace(self._world, num_frames=rng.choice(self._num_frames))
        scenes = sample_scenes(seed, 1, world)
        last = world.num_frames - 1
        branches = []
        for _ in range(self._branches):
            frame = last if self._at_end else rng.randint(0, last)
            asked = ask_any(scenes, 0, rng, self._kinds, frame)
            branches.append(
                Branch(
                    kind=asked.kind,
                    question=asked.text,
                    answer=asked.answer,
                    frame=LAST if asked.frame == last else asked.frame,
                )
            )

        def load(side: int) -> Pictures:
            return render(scenes, side)[0].numpy()

        return Sample(
            name=f"{self._name} clip {number}",
            times_s=scenes.times_s[0].astype(np.float64),
            branches=tuple(branches),
            load=load,
        )
