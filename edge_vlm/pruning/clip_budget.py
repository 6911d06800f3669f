"""The budget of a finished clip: one pool of cells for all its frames, so that later frames decide
about earlier ones. No rule for a live stream; what training, published checkpoints and the row
`clip` of `edge-vlm eval` keep to.

Its variants differ in how many cells a clip keeps, and in which are safe from the pool:

- `published` (the STTS paper and its code, arXiv 2603.18004): `int(C * removed * F)` cells go, the
  lowest scores first. The first frame's go last, but they do go in a clip so short that its share
  is less than a frame. A quiet frame may keep nothing.
- `first_whole` (ours): the share asked for stays, rounded, but in any case the whole first frame
  and `min_cells` of every later one, as a stream's policies have it.

Shape letters: F frames, C cells per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_vlm.config import ModelConfig, Rescale

Variant = Literal["published", "first_whole"]

_FIRST_FRAME_SCORE = 100.0
_FLOOR_BONUS = 10.0
_MOST_PARTS = 1_000_000


def variant_of(cfg: ModelConfig) -> Variant:
    """The one that a model is trained, encoded and measured with: `published` for a scorer that
    stretches its scores by row, as only the published code does."""
    scorer = cfg.scorer
    return "published" if scorer is not None and scorer.rescale is Rescale.ROW else "first_whole"


def num_kept(
    num_frames: int, num_cells: int, keep_ratio: float, min_cells: int = 0, *, variant: Variant
) -> int:
    """Cells that a clip keeps, whatever its scores. `min_cells` is for `first_whole` only.

    Raises ValueError for a ratio outside (0, 1].
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    # 1 - 0.9 is not 0.1 in binary, and one cell can hang on it.
    share = Fraction(keep_ratio).limit_denominator(_MOST_PARTS)
    total = num_frames * num_cells
    if variant == "published":
        return total - int(num_cells * float(1 - share) * num_frames)  # as the code multiplies
    least = num_cells + min(min_cells, num_cells) * (num_frames - 1)
    return min(max(round(share * total), least), total)


def clip_budget(
    scores: npt.NDArray[np.floating], keep_ratio: float, min_cells: int = 0, *, variant: Variant
) -> npt.NDArray[np.bool_]:
    """Scores [F, C] -> bool [F, C], true where a cell is kept: `num_kept` of them.

    Of equal scores the later ones are kept. Raises ValueError on a wrong shape or ratio.
    """
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must be [F, C], got {list(scores.shape)}")
    num_frames, num_cells = scores.shape
    kept = num_kept(num_frames, num_cells, keep_ratio, min_cells, variant=variant)
    rank = scores.astype(np.float32)
    if variant == "first_whole" and min_cells:
        best = np.argsort(-rank[1:], axis=1, kind="stable")[:, :min_cells]
        raised = np.take_along_axis(rank[1:], best, 1) + np.float32(_FLOOR_BONUS)
        np.put_along_axis(rank[1:], best, raised, 1)
    rank[0] = _FIRST_FRAME_SCORE
    mask = np.ones(scores.size, np.bool_)
    mask[np.argsort(rank.ravel(), kind="stable")[: scores.size - kept]] = False
    return mask.reshape(scores.shape)


def context_of(kept: npt.NDArray[np.bool_], *, variant: Variant) -> npt.NDArray[np.bool_]:
    """The cells [F, C] that the blocks behind the drop see: those kept, and in `published` whole
    frames where that code fills up a row. What is not kept goes no further than these blocks."""
    context = kept.copy()
    if variant == "published":
        context[frames_alone(kept.sum(1).tolist(), kept.shape[1])] = True
    return context


def pack_rows(num_kept_F: Sequence[int], capacity: int) -> list[list[int]]:
    """The frames in each row of first-fit-descending packing into rows of `capacity` cells, as the
    published code packs them.

    Frames with nothing kept are not packed. Equal counts are packed in frame order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for frame in sorted(range(len(num_kept_F)), key=lambda i: -num_kept_F[i]):
        size = num_kept_F[frame]
        if size == 0:
            continue
        for row, left in enumerate(room):
            if left >= size:
                rows[row].append(frame)
                room[row] -= size
                break
        else:
            rows.append([frame])
            room.append(capacity - size)
    return rows


def frames_alone(num_kept_F: Sequence[int], capacity: int) -> list[int]:
    """Frames that `pack_rows` leaves alone in their row, in order: the code fills these up with the
    cells that were to go."""
    return sorted(row[0] for row in pack_rows(num_kept_F, capacity) if len(row) == 1)
