"""Scores of a model that has no scorer: how much a cell has changed since it was last kept.

A cell's score is 1 - cosine of its nine patches' vectors, end to end, with those that were last
kept of the same place; against the frame before it is what STTS trains its scorer towards (arXiv
2603.18004). There are no weights in it. It is computed on the host, from what the first blocks of
the vision transformer make of a frame: they do not depend on what is kept.

Shape letters: F frames, N patches per frame, C cells per frame, D width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edge_vlm.config import CELL
from edge_vlm.pruning.policies import Cells, Scores

Hidden = npt.NDArray[np.float32]


def _by_cell(per_patch_N: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sums over the nine patches of each cell, [C]."""
    side = math.isqrt(len(per_patch_N)) // CELL
    sums: npt.NDArray[np.float32] = per_patch_N.reshape(side, CELL, side, CELL).sum((1, 3))
    return sums.ravel()


def _by_patch(per_cell_C: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """What each patch has of its cell, [N]."""
    side = math.isqrt(len(per_cell_C))
    return per_cell_C.reshape(side, side).repeat(CELL, 0).repeat(CELL, 1).ravel()


def _squares(x_ND: Hidden) -> npt.NDArray[np.float32]:
    out: npt.NDArray[np.float32] = np.einsum("nd,nd->n", x_ND, x_ND)
    return out


def unit_cells(hidden_ND: Hidden) -> Hidden:
    """Patches scaled so that each cell's nine together have length 1; [N, D]."""
    length = np.sqrt(_by_cell(_squares(hidden_ND)))
    unit: Hidden = hidden_ND / np.maximum(_by_patch(length), 1e-12)[:, None]
    return unit


def change(unit_ND: Hidden, kept_ND: Hidden) -> Scores:
    """Scores [C] in 0..2 of two frames' `unit_cells`."""
    # Of vectors of length 1 this is 1 - cosine, without the cancellation near 0.
    scores: Scores = _by_cell(_squares(unit_ND - kept_ND)) / np.float32(2)
    return scores


def frame_changes(hidden_FND: Hidden) -> Scores:
    """Scores [F, C] of a clip against the frame before; 1 in the first frame."""
    units = [unit_cells(hidden) for hidden in hidden_FND]
    later = [change(unit, before) for before, unit in pairwise(units)]
    num_cells = hidden_FND.shape[1] // CELL**2
    return np.stack([np.ones(num_cells, np.float32), *later])


class LastKept:
    """What was last kept of each cell of one stream. Never share it between streams."""

    def __init__(self, num_cells: int) -> None:
        self._known = np.zeros(num_cells, np.bool_)
        self._kept: Hidden | None = None
        self._latest: Hidden | None = None

    def forget(self) -> None:
        """Whatever comes next is new."""
        self._known[:] = False

    def scores(self, hidden_ND: Hidden) -> Scores:
        """Scores [C] of the next frame; 1 where nothing was kept yet."""
        self._latest = unit_cells(hidden_ND)
        if self._kept is None:
            self._kept = np.zeros_like(self._latest)
        return np.where(self._known, change(self._latest, self._kept), np.float32(1))

    def keep(self, cells: Cells) -> None:
        """These cells of the frame that was scored last were kept."""
        if self._latest is None or self._kept is None:
            return
        is_kept = np.zeros(self._known.size, np.bool_)
        is_kept[cells] = True
        patches = _by_patch(is_kept).astype(np.bool_)
        self._kept[patches] = self._latest[patches]
        self._known |= is_kept
