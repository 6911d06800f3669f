"""Batches of equally long rendered clips with their truth, asked by what is still wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import Batch
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.trees import TokenWeights, TreeBuilder
from edge_vlm_training.data.sample import Pictures, Sample
from edge_vlm_training.recipes.base import Clips
from edge_vlm_training.world.curriculum import QuestionMix, restore_random, stored_random
from edge_vlm_training.world.render import render_with_owner
from edge_vlm_training.world.scenes import WorldConfig, sample_scenes
from edge_vlm_training.world.truth import Truth

_MOST_CLIPS = 24
_MOST_FORGOTTEN = 6
_LONGEST_PAUSE_S = 40
_WEIGHTS = TokenWeights(fixed={}, scale=1.0, by_branches=False)
"""Long answers (points) would drown the short ones at equal weight per token."""


class WorldClips:
    """A `BatchStream`. What it draws follows from `seed` and from what `mix` was told."""

    def __init__(
        self, data: Clips, cfg: ModelConfig, prompt: PromptFormat, mix: QuestionMix, seed: int
    ) -> None:
        self._data, self._cfg, self._prompt, self._mix = data, cfg, prompt, mix
        self._builder = TreeBuilder(prompt, cfg.attention)
        self._rng = random.Random(seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        return {"random": stored_random(self._rng)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_random(self._rng, state["random"])

    def next_batch(self) -> Batch:
        data, rng = self._data, self._rng
        num_frames, batch = data.num_frames, data.batch
        if data.shorter and rng.random() < 0.5:
            num_frames = rng.choice(data.shorter)
            batch = min(_MOST_CLIPS, batch * data.num_frames // num_frames)
        forgotten, pause_s = 0, 0.0
        if num_frames > 2 and rng.random() < data.forgetful_share:
            forgotten = rng.randint(1, _MOST_FORGOTTEN)
            pause_s = rng.randint(0, _LONGEST_PAUSE_S)
        at_end = self._cfg.attention is VisionAttention.ALL
        if at_end and data.branches:
            # All questions see the whole clip: only its length varies their moment.
            num_frames = rng.randint(1, data.num_frames)
            batch = min(_MOST_CLIPS, batch * data.num_frames // num_frames)
            forgotten = 0
        world = WorldConfig(num_frames=num_frames + forgotten, crowded=data.crowded)
        scenes = sample_scenes(rng.getrandbits(40), batch, world)
        frames, owner = render_with_owner(scenes, self._cfg.vision.image_size)
        shown = np.array([0, *range(1 + forgotten, world.num_frames)])
        frames, times_s = frames[:, shown], scenes.times_s()[:, shown]
        times_s[:, 1:] += pause_s
        truth = Truth(scenes, owner, shown, forgotten)
        if not data.branches:
            return Batch(
                frames_FSS3=frames.flatten(0, 1),
                times_s_F=torch.from_numpy(times_s.flatten()),
                frames_per_clip=(num_frames,) * batch,
                keep_ratio=1.0,
                min_cells=0,
                truth=truth,
            )
        pictures = frames.numpy()
        trees = [
            self._builder.build(
                self._sample(truth, number, pictures[number], times_s[number], at_end)
            )
            for number in range(batch)
        ]
        selection = rng.choice(data.selection)
        keep_ratio = rng.choice(data.keep_ratio)
        floor = rng.randint(0, data.min_cells)
        budget = CellBudget(cfg=self._cfg, keep_ratio=keep_ratio, min_cells=floor)
        return assemble(
            *([[tree] for tree in trees], pictures, self._prompt, _WEIGHTS, budget),
            selection=selection,
            seed=rng.getrandbits(31),
            truth=truth,
            form=data.form,
        )

    def _sample(
        self,
        truth: Truth,
        number: int,
        pictures: Pictures,
        times_s: npt.NDArray[np.floating],
        at_end: bool,
    ) -> Sample:
        """A clip with its questions."""
        data = self._data
        branches = self._mix.branches(
            *(truth.scenes, number, data.branches, data.history_share, truth.forgotten, at_end)
        )
        return Sample(
            name=f"rendered clip {number}",
            times_s=times_s.astype(np.float64),
            branches=tuple(branches),
            load=lambda _side: pictures,
        )
