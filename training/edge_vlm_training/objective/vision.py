"""Clips of any number and length through the vision side, with what the similarity loss needs.

Shape letters: F frames of all clips end to end, N patches and C cells of a frame, G kept cells over
all frames, E language width, S side of a picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edge_vlm.config import Rescale, VisionConfig
from edge_vlm.model.clips import encode_clips
from edge_vlm.model.ragged import best_method
from edge_vlm.model.reference import encode_reference
from edge_vlm.model.reuse import reuse_clips
from edge_vlm.model.selection import clip_budget
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pruning.policies import make_policy
from edge_vlm.pruning.reuse import ReuseRule, computed_cells
from edge_vlm_training.objective.losses import similarity_errors
from edge_vlm_training.recipes.base import Selection


@dataclasses.dataclass(frozen=True)
class SeenClips:
    """What the language model reads of the clips, and the similarity loss as sum and number."""

    features_GE: Tensor
    kept_FC: Tensor
    """bool"""
    aux_sum: Tensor
    """fp32 scalar over `aux_count` cells of frames that have a predecessor in their clip."""


def first_frames(frames_per_clip: Sequence[int], device: torch.device) -> Tensor:
    """bool [F]: true where a clip starts."""
    is_first = torch.zeros(sum(frames_per_clip), dtype=torch.bool)
    is_first[[sum(frames_per_clip[:i]) for i in range(len(frames_per_clip))]] = True
    return is_first.to(device)


def aux_count(frames_per_clip: Sequence[int], num_cells: int) -> int:
    """Cells that the similarity loss is about: all but those of first frames."""
    return (sum(frames_per_clip) - len(frames_per_clip)) * num_cells


def to_pixel_values(frames_FSS3: Tensor, cfg: VisionConfig, dtype: torch.dtype) -> Tensor:
    """u8 at the model's size to normalised patches [F, N, 3 patch^2] of `dtype`.

    The batched torch twin of `edge_vlm.pixels.patches.to_pixel_values` without the resize.
    """
    grid, side = cfg.patch_grid, cfg.patch_size
    x = frames_FSS3.reshape(-1, grid, side, grid, side, 3).permute(0, 1, 3, 2, 4, 5)
    return (x.reshape(-1, grid * grid, cfg.patch_dim).to(dtype) / 127.5) - 1.0


def choose_cells(
    scores_FC: Tensor,
    frames_per_clip: Sequence[int],
    keep_ratio: float,
    min_cells: int,
    selection: Selection = "clip",
    seed: int = 0,
) -> Tensor:
    """Bool [F, C]: each clip's kept cells. First frames are kept whole; `min_cells` of every later
    frame stay whatever their rank; `seed` is for policies that draw."""
    if keep_ratio == 1:
        return torch.ones_like(scores_FC, dtype=torch.bool)
    clips = torch.split(scores_FC.detach(), list(frames_per_clip))
    if selection in ("clip", "published"):
        kept = [clip_budget(c, keep_ratio, min_cells, variant="first_whole") for c in clips]
        return torch.cat(kept)
    mask = np.zeros(scores_FC.shape, np.bool_)
    frame = 0
    for number, clip_TC in enumerate(clips):
        policy = make_policy(selection, keep_ratio, min_cells=min_cells, seed=seed + number)
        for t, row_C in enumerate(clip_TC.float().cpu().numpy()):
            mask[frame, policy.select(row_C, None, t == 0)] = True
            frame += 1
    return torch.from_numpy(mask).to(scores_FC.device)


def see_clips(
    model: VideoLM,
    pixels_FNP: Tensor,
    frames_per_clip: Sequence[int],
    keep_ratio: float,
    min_cells: int,
    dtype: torch.dtype,
    *,
    selection: Selection = "published",
    seed: int = 0,
    reuse: Sequence[float] = (),
    evicted_F: Tensor | None = None,
) -> SeenClips:
    """Scores, prunes each clip by its own budget and encodes, as `encode_clips` does.

    `reuse`: of each clip, the threshold of change (0..255) below which a cell keeps what was
    computed of it in front of the scorer, as in a session that has it; by default all is computed.
    Raises ValueError where that is to be `published`, which knows no reuse. Cells of frames that
    are `evicted` (bool) are chosen and counted, so that others are chosen as they would be, and
    then dropped.

    Cells `published` by a scorer with `Rescale.ROW` are trained as published (target not detached),
    each clip as if it were alone in its pack. A model without a scorer keeps every cell and has no
    similarity loss. `dtype` is that of the products.
    """
    scorer = model.scorer
    if scorer is None:
        run = encode_clips(model, pixels_FNP, frames_per_clip, keep_ratio=1.0)
        return SeenClips(run.features_GE, run.kept_FC, pixels_FNP.new_zeros((), dtype=torch.float))
    is_first = first_frames(frames_per_clip, pixels_FNP.device)
    if scorer.cfg.rescale is Rescale.ROW and selection == "published":
        if any(reuse):
            raise ValueError("reuse is no part of the published computation")
        published = encode_reference(
            model,
            pixels_FNP,
            frames_per_clip,
            keep_ratio=keep_ratio,
            refill_by_clip=True,
            record=False,
        )
        cells = model.vit.cells(published.hidden_FND[scorer.cfg.prune_at])
        errors = similarity_errors(published.scores_FC, cells, is_first, detach_target=False)
        return SeenClips(published.features_GE, published.kept_FC, errors.sum())
    if any(reuse):
        computed = _computed(model, pixels_FNP, frames_per_clip, reuse)
        reused = reuse_clips(model, pixels_FNP, computed, is_first)
        hidden, scores, scored = reused.hidden_FND, reused.scores_FC, reused.scored_FCWD
        assert scores is not None
    else:
        x = model.embed_frames(pixels_FNP)
        nobody = x.new_zeros(1, model.cfg.vision.num_cells, x.shape[-1])
        _, scores = model.score_frames(x, nobody, is_first)
        hidden, scored = model.biased_block(x, scores, is_first), model.vit.cells(x.detach())
    errors = similarity_errors(scores, scored, is_first)
    kept = choose_cells(scores, frames_per_clip, keep_ratio, min_cells, selection, seed)
    if evicted_F is not None:
        kept &= ~evicted_F.to(kept.device)[:, None]
    cells = kept.flatten().nonzero().squeeze(1)
    method = best_method(pixels_FNP.device, dtype)
    features = model.vit_trunk(hidden, cells, cells // kept.shape[1], method=method)
    return SeenClips(features, kept, errors.sum())


def _computed(
    model: VideoLM, pixels_FNP: Tensor, frames_per_clip: Sequence[int], reuse: Sequence[float]
) -> Tensor:
    """Bool [F, C]: what the blocks in front of the scorer compute of each clip."""
    num_cells = model.cfg.vision.num_cells
    clips = pixels_FNP.detach().float().cpu().split(list(frames_per_clip))
    masks = [
        computed_cells([clip.numpy()], num_cells, ReuseRule(threshold=threshold))
        for clip, threshold in zip(clips, reuse, strict=True)
    ]
    return torch.from_numpy(np.concatenate(masks)).to(pixels_FNP.device)
