"""A bundle on real pictures: every value finite, and how much of the answer is torch's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_vlm.formats.footage import read_footage
from edge_vlm_export.verify.compare_pipelines import PipelineComparison, compare_results
from edge_vlm_export.verify.pipeline import Clip, Pipeline

FPS = 2.0
CLIP_FRAMES = 4
"""Frames that the language model reads at once; longer footage is several such clips."""


def footage_clips(paths: Iterable[Path], max_frames: int) -> Iterator[Clip]:
    """The first `max_frames` frames of each footage, in clips of `CLIP_FRAMES`. Raises VideoError.

    A question set's own cuts begin a new clip.
    """
    for path in paths:
        pictures: list[np.ndarray] = []
        for is_first, rgb in read_footage(path, FPS, max_frames):
            if pictures and (is_first or len(pictures) == CLIP_FRAMES):
                yield Clip(pictures=pictures, fps=FPS)
                pictures = []
            pictures.append(rgb)
        yield Clip(pictures=pictures, fps=FPS)


@dataclass(frozen=True, kw_only=True)
class FootageCheck:
    """One video. That this exists says that everything the graphs gave was finite."""

    name: str
    frames: int
    clips: int
    compared: tuple[PipelineComparison, ...] = ()
    """With torch, clip by clip; empty without a checkpoint."""

    @property
    def same_cells(self) -> int:
        """Frames of which the same cells were kept."""
        return sum(clip.same_cells for clip in self.compared)

    @property
    def tokens(self) -> int:
        return sum(clip.tokens for clip in self.compared)

    @property
    def same_tokens(self) -> int:
        """Of each clip's answer, up to the first that differs."""
        return sum(clip.same_tokens for clip in self.compared)

    @property
    def logits(self) -> float:
        """Least cosine after the question; NaN without a comparison."""
        return min((clip.logits for clip in self.compared), default=math.nan)

    @property
    def features(self) -> float:
        """Least cosine where the same cells were kept; NaN if they never were."""
        known = [clip.features for clip in self.compared if not math.isnan(clip.features)]
        return min(known, default=math.nan)

    def __str__(self) -> str:
        line = f"{self.name}: {self.frames} frames in {self.clips} clips, every value finite"
        if not self.compared:
            return line
        return (
            f"{line}; against torch: same cells kept in {self.same_cells} of {self.frames} frames, "
            f"features cosine at least {self.features:.6f}, logits cosine at least "
            f"{self.logits:.6f}, {self.same_tokens} of {self.tokens} answer tokens the same"
        )


def check_footage(
    path: Path, max_frames: int, pipeline: Pipeline, torch: Pipeline | None, *, exact: bool
) -> FootageCheck:
    """Streams the first frames of a video through the bundle, and through torch if it is given.

    `exact`: nothing was quantised, so a difference is a fault. Raises NonFinite naming graph and
    tensor, VideoError.
    """
    frames = clips = 0
    compared = []
    for clip in footage_clips([path], max_frames):
        frames, clips = frames + len(clip.pictures), clips + 1
        got = pipeline.stream(clip)
        if torch is not None:
            name = f"clip {clips} of {path.name} against torch"
            compared.append(compare_results(name, got, torch.stream(clip), exact))
    return FootageCheck(name=path.name, frames=frames, clips=clips, compared=tuple(compared))
