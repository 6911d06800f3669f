"""Samples, a vocabulary and a tiny model for the tests of packing."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers
import torch

from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.text.prompt import OWN_FRAME_END, OWN_FRAME_START, PLAIN, PromptFormat, PromptStyle
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.packing.row_stream import PackingConfig
from edge_vlm_training.data.sample import LAST, Branch, Pictures, Sample
from edge_vlm_training.data.sources.mixture import Mixture, Share
from edge_vlm_training.world.vocabulary import build_tokenizer

QUESTIONS = ("what is it?", "is it red?", "how many are there now?", "describe it.")
ANSWERS = ("cat", "it is red", "there are two of them", "a cat and a red ball stand on a table")
SMALL = PackingConfig(max_tokens=260, max_frames=12, window=6, max_branches=4)


PUBLISHED = PromptStyle(own_frame_markers=True, space_before_answers=True)
"""As the published STTS training writes its prompts."""


@lru_cache(maxsize=4)
def prompt(style: PromptStyle = PLAIN) -> PromptFormat:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        build_tokenizer([*QUESTIONS, *ANSWERS], path)
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.add_special_tokens([OWN_FRAME_START, OWN_FRAME_END])
        return PromptFormat(Tokenizer(backend), style)


def config(
    attention: VisionAttention = VisionAttention.FRAME, rescale: Rescale = Rescale.ABSOLUTE
) -> ModelConfig:
    cfg = dataclasses.replace(tiny(base_vocab=60, extra_vocab=8), attention=attention)
    assert cfg.scorer is not None
    return dataclasses.replace(cfg, scorer=dataclasses.replace(cfg.scorer, rescale=rescale))


def model(cfg: ModelConfig) -> VideoLM:
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(3)).eval()


def clip(name: str, num_frames: int, branches: int, *, at_end: bool = True) -> Sample:
    """A clip of noise that is the same for the same arguments."""
    rng = np.random.default_rng([num_frames, branches, *name.encode()])

    def load(side: int) -> Pictures:
        noise = np.random.default_rng([num_frames, *name.encode()])
        return noise.integers(0, 256, (num_frames, side, side, 3), np.uint8)

    return Sample(
        name=name,
        times_s=np.arange(num_frames, dtype=np.float64) / 2,
        branches=tuple(
            Branch(
                kind=("qa", "caption", "point")[int(rng.integers(3))],
                question=str(rng.choice(QUESTIONS)),
                answer=str(rng.choice(ANSWERS)),
                frame=LAST if at_end else int(rng.integers(num_frames)),
                history=((QUESTIONS[0], ANSWERS[0]),) * int(rng.integers(2)),
            )
            for _ in range(branches)
        ),
        load=load,
    )


@dataclasses.dataclass(frozen=True)
class Clips:
    """A source of such clips."""

    name: str = "clips"
    at_end: bool = True
    most_frames: int = 5
    most_branches: int = 6

    def sample(self, number: int) -> Sample:
        rng = np.random.default_rng(number)
        frames = int(rng.integers(1, self.most_frames + 1))
        branches = int(rng.integers(1, self.most_branches + 1))
        return clip(f"{self.name} {number}", frames, branches, at_end=self.at_end)


def mixture(seed: int = 0, **fields: bool) -> Mixture:
    return Mixture([Share(Clips("a", **fields), 2.0), Share(Clips("b", **fields), 1.0)], seed=seed)
