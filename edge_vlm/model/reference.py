"""The vision side exactly as the published STTS code computes it (arXiv 2603.18004).

A checkpoint trained by that code gives its own answers only with its own rules: the clip budget
over all cells of a finished clip, scores stretched per row of patches, and *refilled* frames. The
published code packs the survivors of several frames into rows of one frame's length; a frame that
ends up alone in its row keeps all its patches as attention context, which changes the features of
the kept ones. The packing itself is not reproduced, only its outcome: attention stays ragged.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells over all frames,
D ViT width, E language width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from edge_vlm.config import CELL, Rescale
from edge_vlm.model.selection import clip_budget
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pruning.clip_budget import frames_alone


@dataclasses.dataclass(frozen=True)
class ReferenceEncoding:
    """What the vision side of the published code makes of a pack of clips."""

    scores_FC: Tensor
    kept_FC: Tensor
    """bool"""
    features_GE: Tensor
    """One row per kept cell, by frame, then row-major by cell."""
    hidden_FND: dict[int, Tensor]
    """Output of each block from `prune_at` on, zero at dropped patches after the drop."""


def encode_reference(
    model: VideoLM,
    pixels_FNP: Tensor,
    frames_per_clip: Sequence[int],
    *,
    keep_ratio: float,
    previous_across_clips: bool = False,
    refill_by_clip: bool = False,
    record: bool = True,
) -> ReferenceEncoding:
    """Encodes whole clips, end to end in `pixels`, keeping a share of each one.

    `previous_across_clips` scores a later clip's first frame against the last frame of the clip
    before it, as the published code does by mistake. With `refill_by_clip` frames are refilled as
    if each clip were alone in the pack, so that no clip changes another's. Without `record` only
    the hidden states that the scorer saw are kept. Raises ValueError if the frames do not add up or
    the model does not rescale its scores by row.
    """
    if sum(frames_per_clip) != pixels_FNP.shape[0] or min(frames_per_clip, default=0) < 1:
        raise ValueError(
            f"frames_per_clip = {list(frames_per_clip)} does not add up to {len(pixels_FNP)}"
        )
    if model.scorer is None or model.scorer.cfg.rescale is not Rescale.ROW:
        raise ValueError("reference mode needs a scorer with rescale = 'row'")
    prune_at = model.scorer.cfg.prune_at
    is_first = torch.zeros(len(pixels_FNP), dtype=torch.bool, device=pixels_FNP.device)
    is_first[[sum(frames_per_clip[:i]) for i in range(len(frames_per_clip))]] = True
    alone_first = is_first.clone()
    if previous_across_clips:
        alone_first[1:] = False

    x = model.embed_frames(pixels_FNP)
    hidden = {prune_at: x}
    no_previous = x.new_zeros(1, model.cfg.vision.num_cells, x.shape[-1])
    _, scores = model.score_frames(x, no_previous, alone_first)
    x = model.biased_block(x, scores, is_first)
    hidden[prune_at + 1] = x

    clips = scores.split(list(frames_per_clip))
    kept = torch.cat([clip_budget(clip, keep_ratio, variant="published") for clip in clips])
    context = kept.clone()
    start = 0
    for frames in frames_per_clip if refill_by_clip else [len(kept)]:
        counts = kept[start : start + frames].sum(1).tolist()
        context[start : start + frames][frames_alone(counts, kept.shape[1])] = True
        start += frames
    features, later = _trunk(model, x, kept, context, record)
    if not record:
        del hidden[prune_at + 1]
    return ReferenceEncoding(scores, kept, features, hidden | later)


def _trunk(
    model: VideoLM, x_FND: Tensor, kept_FC: Tensor, context_FC: Tensor, record: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """Later blocks on every context cell, connector on the kept ones."""
    vit, patches_per_cell = model.vit, CELL * CELL
    frame_G, cell_G = context_FC.nonzero(as_tuple=True)
    layout = model.lay_out(frame_G, x_FND)
    frame_G, cell_G = layout.arrange(frame_G), layout.arrange(cell_G)
    is_kept_G = kept_FC[frame_G, cell_G]
    patches_G9 = vit.cell_patches_C9[cell_G]
    x = x_FND[frame_G[:, None], patches_G9].flatten(0, 1)
    places = (frame_G[is_kept_G][:, None], patches_G9[is_kept_G])
    kept_G9D = {model.trunk_start - 1: x.unflatten(0, (-1, patches_per_cell))[is_kept_G]}
    hidden: dict[int, Tensor] = {}
    for i in range(model.trunk_start, model.cfg.vision.num_layers):
        x = vit.block(i).forward_ragged(x, layout)
        if record or i in model.cfg.vision.feature_layers:
            kept_G9D[i] = x.unflatten(0, (-1, patches_per_cell))[is_kept_G]
        if record:
            hidden[i] = torch.zeros_like(x_FND).index_put(places, kept_G9D[i])
    joined = torch.cat([kept_G9D[i] for i in model.cfg.vision.feature_layers], -1)
    number_G = (frame_G * kept_FC.shape[1] + cell_G)[is_kept_G]
    return model.connector(joined[number_G.argsort()]), hidden
