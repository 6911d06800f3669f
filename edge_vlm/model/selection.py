"""Which cells survive, for a whole batch of finished clips at once (live: `edge_vlm.pruning`).

Shape letters: B clips, T frames per clip, C cells per frame.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_kept(num_frames: int, num_cells: int, removed: float, floor: int) -> int:
    """Cells a clip keeps: the share asked for, but the first frame and every floor in any case."""
    least = num_cells + floor * (num_frames - 1)
    return min(max(round((1 - removed) * num_frames * num_cells), least), num_frames * num_cells)


def clip_budget(scores_BTC: Tensor, removed: float, floor: int = 0) -> Tensor:
    """Bool keep mask [B, T, C]: whole first frame, then the clip's best cells, equally many a clip.

    `floor` cells of every later frame stay whatever their rank.
    """
    num_clips, num_frames, num_cells = scores_BTC.shape
    rank = scores_BTC.detach().clone()
    if floor:
        best = rank.topk(floor, -1).indices
        rank.scatter_add_(-1, best, torch.full_like(best, 10.0, dtype=rank.dtype))
    rank[:, 0] = 100.0
    kept = num_kept(num_frames, num_cells, removed, floor)
    mask = torch.zeros(num_clips, num_frames * num_cells, dtype=torch.bool, device=rank.device)
    mask.scatter_(1, rank.flatten(1).topk(kept, 1).indices, True)
    return mask.view_as(scores_BTC)
