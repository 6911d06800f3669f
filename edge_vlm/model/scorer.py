"""The STTS token scorer (arXiv 2603.18004): one score per cell from this frame and the last.

Shape letters: F frames, C cells per frame, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.config import Rescale, ScorerConfig
from edge_vlm.model.layers import CellPooler


class TokenScorer(nn.Module):
    """Pools each cell, joins it with the same cell one frame earlier, and rates it in (0, 1)."""

    def __init__(self, cfg: ScorerConfig, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.pool = CellPooler(width, cfg.num_heads, cfg.head_dim, width)
        self.fc1 = nn.Linear(2 * width, cfg.mlp_width)
        self.fc2 = nn.Linear(cfg.mlp_width, cfg.mlp_width)
        self.fc3 = nn.Linear(cfg.mlp_width, 1)

    def pool_cells(self, patches_FC9D: Tensor) -> Tensor:
        """Returns [F, C, D]."""
        out: Tensor = self.pool(patches_FC9D.flatten(0, 1)).unflatten(0, patches_FC9D.shape[:2])
        return out

    def forward(self, prev_FCD: Tensor, cells_FCD: Tensor) -> Tensor:
        """Returns fp32 scores [F, C]; `prev` is zero for the first frame of a clip."""
        x = torch.cat([prev_FCD, cells_FCD], -1)
        x = F.silu(self.fc2(F.silu(self.fc1(x))))
        logits: Tensor = self.fc3(x).squeeze(-1).float().sigmoid()
        return logits

    def key_bias(self, scores_FC: Tensor, is_first_F: Tensor) -> Tensor:
        """Log-score bias of each cell, [F, C] in [log rescale_min, 0]; 0 on first frames.

        This is the only way by which the language loss reaches the scorer. `Rescale.ROW` follows
        the reference, which stretches every row of patches on its own; patches of one row of cells
        share their scores, so it is done on rows of cells here, with the same result.
        """
        low = self.cfg.rescale_min
        if self.cfg.rescale is Rescale.ABSOLUTE:
            unit = scores_FC
        else:
            side = int(scores_FC.shape[1] ** 0.5)
            rows = scores_FC.view(-1, side, side) if self.cfg.rescale is Rescale.ROW else scores_FC
            least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
            unit = ((rows - least) / (most - least + 1e-6)).view_as(scores_FC)
        bias = (low + (1 - low) * unit).log()
        return torch.where(is_first_F[:, None], 0.0, bias)
