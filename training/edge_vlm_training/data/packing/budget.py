"""How many cells a clip keeps: known before the model chooses which."""

from __future__ import annotations

import dataclasses

from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.model.selection import num_kept


def kept_of_clip(num_frames: int, num_cells: int, keep_ratio: float, min_cells: int) -> int:
    """Cells of a clip: the share asked for, but the first frame and every floor in any case."""
    return num_kept(num_frames, num_cells, 1 - keep_ratio, min_cells)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellBudget:
    """The rule that `see_clips` keeps to in the mode of `cfg`."""

    cfg: ModelConfig
    keep_ratio: float
    min_cells: int

    def kept(self, num_frames: int) -> int:
        num_cells = self.cfg.vision.num_cells
        if self.cfg.scorer is not None and self.cfg.scorer.rescale is Rescale.ROW:
            # The published code counts those that it drops.
            return num_frames * num_cells - int(num_cells * (1 - self.keep_ratio) * num_frames)
        return kept_of_clip(num_frames, num_cells, self.keep_ratio, self.min_cells)
