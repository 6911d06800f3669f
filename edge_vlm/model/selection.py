"""Which cells survive, for whole batches of finished clips as tensors (live: `edge_vlm.pruning`).

Shape letters: T frames per clip, C cells per frame.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_vlm.pruning import clip_budget as rule


def clip_budget(
    scores_TC: Tensor, keep_ratio: float, min_cells: int = 0, *, variant: rule.Variant
) -> Tensor:
    """Bool, as `scores` [..., T, C]: each clip by `edge_vlm.pruning.clip_budget`.

    The choice is made on the CPU: it is small, and the same there for every device.
    """
    clips = scores_TC.detach().float().cpu().numpy().reshape(-1, *scores_TC.shape[-2:])
    masks = [rule.clip_budget(clip, keep_ratio, min_cells, variant=variant) for clip in clips]
    return torch.from_numpy(np.stack(masks)).view(scores_TC.shape).to(scores_TC.device)
