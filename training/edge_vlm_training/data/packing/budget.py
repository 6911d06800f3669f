"""How many cells a clip keeps: known before the model chooses which."""

from __future__ import annotations

import dataclasses

from edge_vlm.config import ModelConfig
from edge_vlm.pruning.clip_budget import num_kept, variant_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellBudget:
    """The rule that `see_clips` keeps to in the mode of `cfg`."""

    cfg: ModelConfig
    keep_ratio: float
    min_cells: int

    def kept(self, num_frames: int) -> int:
        cells, variant = self.cfg.vision.num_cells, variant_of(self.cfg)
        return num_kept(num_frames, cells, self.keep_ratio, self.min_cells, variant=variant)
