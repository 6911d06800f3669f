"""Finished clips through the whole vision side, in the mode that the model's config names.

- `Rescale.ROW`: the published STTS computation to the letter (`edge_vlm.model.reference`), so that
  a published checkpoint gives its own answers.
- any other rescaling: ours. The first frame is kept whole, every later one keeps `min_cells`, and
  what is left of the clip's budget goes to its best cells. The same features as frame by frame.
- scored by change (`edge_vlm.pruning.change`): as ours, against the frame before.
- no scorer: every cell is kept.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells over all frames, E
language width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edge_vlm.config import Rescale
from edge_vlm.model.reference import encode_reference
from edge_vlm.model.selection import clip_budget
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pruning.change import frame_changes


@dataclasses.dataclass(frozen=True)
class EncodedClips:
    features_GE: Tensor
    """One row per kept cell, by frame, then by cell."""
    kept_FC: Tensor
    """bool"""
    scores_FC: Tensor | None


def encode_clips(
    model: VideoLM,
    pixels_FNP: Tensor,
    frames_per_clip: Sequence[int],
    *,
    keep_ratio: float,
    min_cells: int = 2,
) -> EncodedClips:
    """Encodes clips that lie end to end in `pixels`, keeping a share of each one's cells.

    Raises ValueError if the frames do not add up, for a share outside 0..1 (0 excluded), or if a
    model without a scorer shall not keep everything.
    """
    if sum(frames_per_clip) != len(pixels_FNP) or min(frames_per_clip, default=0) < 1:
        raise ValueError(
            f"frames_per_clip = {list(frames_per_clip)} does not add up to {len(pixels_FNP)}"
        )
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio = {keep_ratio}: must lie in (0, 1]")
    vision = model.cfg.vision
    if model.cfg.change is not None:
        hidden, scored = model.change_stem(pixels_FNP)
        clips = scored.detach().float().cpu().split(list(frames_per_clip))
        changes = np.concatenate([frame_changes(clip.numpy()) for clip in clips])
        scores = torch.from_numpy(changes).to(pixels_FNP.device)
        kept = _best(scores, frames_per_clip, keep_ratio, min_cells)
        return EncodedClips(_kept_features(model, hidden, kept), kept, scores)
    if model.scorer is None:
        if keep_ratio < 1:
            raise ValueError(f"keep_ratio = {keep_ratio}: a model without a scorer keeps all cells")
        kept = torch.ones(len(pixels_FNP), vision.num_cells, dtype=torch.bool)
        kept = kept.to(pixels_FNP.device)
        return EncodedClips(_kept_features(model, model.vit.embed(pixels_FNP), kept), kept, None)
    if model.scorer.cfg.rescale is Rescale.ROW:
        run = encode_reference(model, pixels_FNP, frames_per_clip, keep_ratio=keep_ratio)
        return EncodedClips(run.features_GE, run.kept_FC, run.scores_FC)
    is_first = torch.zeros(len(pixels_FNP), dtype=torch.bool)
    is_first[[sum(frames_per_clip[:i]) for i in range(len(frames_per_clip))]] = True
    nobody = pixels_FNP.new_zeros(1, vision.num_cells, vision.width)
    hidden, _, scores = model.vit_stem(pixels_FNP, nobody, is_first.to(pixels_FNP.device))
    kept = _best(scores, frames_per_clip, keep_ratio, min_cells)
    return EncodedClips(_kept_features(model, hidden, kept), kept, scores)


def _best(
    scores_FC: Tensor, frames_per_clip: Sequence[int], keep_ratio: float, min_cells: int
) -> Tensor:
    """Kept cells, bool [F, C]."""
    clips = scores_FC.split(list(frames_per_clip))
    masks = [clip_budget(clip, keep_ratio, min_cells, variant="first_whole") for clip in clips]
    return torch.cat(masks)


def _kept_features(model: VideoLM, hidden_FND: Tensor, kept_FC: Tensor) -> Tensor:
    cells = kept_FC.flatten().nonzero().squeeze(1)
    return model.vit_trunk(hidden_FND, cells, cells // kept_FC.shape[1])
