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
from edge_vlm.world.harder import harder
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import WorldConfig
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import Batch
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.trees import TokenWeights, TreeBuilder
from edge_vlm_training.data.sample import Pictures, Sample, draw_reuse
from edge_vlm_training.recipes.base import CLIP_FRAME_TOKENS, MOST_EVICTED, Clips
from edge_vlm_training.world.curriculum import QuestionMix, restore_random, stored_random
from edge_vlm_training.world.render import render_with_owner
from edge_vlm_training.world.streams import stream_scenes
from edge_vlm_training.world.truth import Truth

_MOST_CLIPS = 24
_MOST_FORGOTTEN = 6
_LONGEST_PAUSE_S = 40
_EVICTING = 0.75
"""Share of steps with clips of streams of which something was forgotten."""
_LONGEST_TURN = 64
"""Tokens of a question, what was said before it, and its answer."""
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
        if data.other_lengths and rng.random() < 0.5:
            num_frames = rng.choice(data.other_lengths)
            batch = max(1, min(_MOST_CLIPS, batch * data.num_frames // num_frames))
        if data.stream_share and num_frames > 1 and rng.random() < data.stream_share:
            return self._stream_batch(num_frames, batch)
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
        if data.harder_share and rng.random() < data.harder_share:
            world = harder(world)
        scenes = sample_scenes(rng.getrandbits(40), batch, world)
        frames, owner = render_with_owner(scenes, self._cfg.vision.image_size)
        shown = np.array([0, *range(1 + forgotten, world.num_frames)])
        frames, times_s = frames[:, shown], scenes.times_s[:, shown]
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
        return self._packed(truth, frames.numpy(), times_s, at_end=at_end)

    def _stream_batch(self, num_frames: int, batch: int) -> Batch:
        """Clips as a session has them that has run for a while."""
        data, rng = self._data, self._rng
        evicted = rng.randint(1, MOST_EVICTED) if rng.random() < _EVICTING else 0
        scenes = stream_scenes(
            np.random.default_rng(rng.getrandbits(40)),
            *(batch, num_frames + evicted, evicted, data.stream_time_s),
        )
        frames, owner = render_with_owner(scenes, self._cfg.vision.image_size)
        shown = np.array([0, *range(1 + evicted, scenes.num_frames)])
        longest = CLIP_FRAME_TOKENS * num_frames + _LONGEST_TURN
        room = self._cfg.language.max_positions - longest
        gaps = [rng.randint(0, max(0, room)) if rng.random() < 0.5 else 0 for _ in range(batch)]
        return self._packed(
            Truth(scenes, owner, shown, evicted),
            frames.numpy(),
            scenes.times_s,
            evicted=(evicted,) * batch,
            gaps=tuple(gaps) if evicted else (),
        )

    def _packed(
        self,
        truth: Truth,
        pictures: Pictures,
        times_s: npt.NDArray[np.floating],
        *,
        at_end: bool = False,
        evicted: tuple[int, ...] = (),
        gaps: tuple[int, ...] = (),
    ) -> Batch:
        """The clips with questions; `pictures` u8 [B, T, S, S, 3]."""
        data, rng = self._data, self._rng
        trees = [
            self._builder.build(
                self._sample(
                    truth, number, pictures[number], times_s[number], at_end, bool(evicted)
                )
            )
            for number in range(len(pictures))
        ]
        selection = rng.choice(data.selection)
        keep_ratio = rng.choice(data.keep_ratio)
        floor = rng.randint(0, data.min_cells)
        budget = CellBudget(cfg=self._cfg, keep_ratio=keep_ratio, min_cells=floor)
        seed = rng.getrandbits(31)
        return assemble(
            *([[tree] for tree in trees], pictures, self._prompt, _WEIGHTS, budget),
            selection=selection,
            seed=seed,
            reuse=draw_reuse(data.reuse, len(trees), seed),
            evicted=evicted,
            gaps=gaps,
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
        in_stream: bool,
    ) -> Sample:
        """A clip with its questions."""
        data = self._data
        branches = self._mix.branches(
            *(truth.scenes, number, data.branches, data.history_share, truth.forgotten, at_end),
            in_stream=in_stream,
            absent_share=data.absent_share,
            look_alike_share=data.look_alike_share,
        )
        return Sample(
            name=f"rendered clip {number}",
            times_s=times_s.astype(np.float64),
            branches=tuple(branches),
            load=lambda _side: pictures,
        )
