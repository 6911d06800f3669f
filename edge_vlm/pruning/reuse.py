"""Which cells of a frame the blocks in front of the scorer compute anew, and which keep what was
computed of them: a rule about pixels, in numpy.

A cell is computed anew when

- one of its patches has changed by the threshold or more since the cell was last computed: against
  the pixels that the kept state was computed from, so that drift adds up;
- such a patch of a neighbouring cell touches it;
- most other cells have changed since it was last computed: its state speaks of another scene, also
  where a cut, a fade or a pan has left its own pixels alike;
- it was computed longest ago and its turn has come: each cell is at least every `refresh_frames`
  frames, and no frame pays for all of them.

Everything is computed anew in the first frame, where the picture has another size, and where much
changes at once.

Shape letters: F frames, N patches per frame, P values of a patch, C cells per frame, M cells that
are computed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_vlm.config import CELL
from edge_vlm.pixels.patches import cell_table

Cells = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
PixelValues = npt.NDArray[np.float32]

REFRESH_FRAMES = 32
MOST_CHANGED = 0.6
"""From this share of changed cells on, what is kept of the others belongs to another scene."""
SUDDEN = 0.25
"""So much more than in any of the last frames changes where a picture is cut or the camera moves:
cells that look alike by chance are not kept then."""
CUT_LEVELS = 12.0
"""What changed by so many grey levels shows something else, however high the threshold is: cuts are
found by it."""
RECENT_FRAMES = 8
GREY_LEVELS = 127.5
"""Of 255, per unit of a pixel value in -1..1."""


@dataclass(frozen=True, kw_only=True)
class ReuseRule:
    """Raises ValueError for a threshold outside 0..255 or fewer than one frame."""

    threshold: float
    """Mean absolute difference of a patch's pixels, in grey levels (0..255), from which on it has
    changed. 0: always."""
    refresh_frames: int = REFRESH_FRAMES

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 255.0:
            raise ValueError(f"threshold must be in 0..255, got {self.threshold}")
        if self.refresh_frames < 1:
            raise ValueError(f"refresh_frames must be at least 1, got {self.refresh_frames}")


def patch_differences(pixels_NP: PixelValues, kept_NP: PixelValues) -> npt.NDArray[np.float32]:
    """Mean absolute differences [N] in grey levels of two frames' pixel values in -1..1."""
    difference = np.subtract(pixels_NP, kept_NP)
    means: npt.NDArray[np.float32] = np.abs(difference, out=difference).mean(1)
    return means * np.float32(GREY_LEVELS)


def touched(patches_N: Mask) -> Mask:
    """The patches [N] and the eight round each of them."""
    side = math.isqrt(len(patches_N))
    framed = np.pad(patches_N.reshape(side, side), 1)
    rows = framed[:-2] | framed[1:-1] | framed[2:]
    around: Mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return around.ravel()


class CellsComputed:
    """Which pixels each cell's state of one stream was computed from. Never share it between
    streams."""

    def __init__(self, num_cells: int, rule: ReuseRule) -> None:
        """`num_cells` is a square number."""
        self.rule = rule
        """May be set anew at any time; it holds from the next frame on."""
        self.num_cells = num_cells
        self._patches = cell_table(math.isqrt(num_cells))
        self._pixels: PixelValues | None = None
        self._size: tuple[int, int] | None = None
        self._ages = np.zeros(num_cells, np.int64)
        """Frames since each cell was computed."""
        self._changed_since = np.zeros((num_cells, num_cells), np.bool_)
        """For each cell, those whose pixels changed since it was computed."""
        self._frames = 0
        """Since all cells were computed."""
        self._recent: deque[float] = deque(maxlen=RECENT_FRAMES)
        """Shares of cells that changed."""
        self._moved: Mask = np.ones(num_cells, np.bool_)
        """Cells that changed in the frame `next` was asked about last."""

    def forget(self) -> None:
        """Nothing is kept any more: the next frame is computed whole."""
        self._pixels = None

    def next(self, pixels_NP: PixelValues, size: tuple[int, int]) -> Cells:
        """The cells [M], ascending, that the stream's next frame has to have computed. `pixels` are
        in -1..1; `size` is the picture's height and width before it was resized.

        Call `computed` when they have been: a frame that fails leaves things as they were. Raises
        ValueError for pixels of another grid.
        """
        if pixels_NP.ndim != 2 or len(pixels_NP) != self.num_cells * CELL**2:
            raise ValueError(
                f"pixels must be [{self.num_cells * CELL**2}, P], got {list(pixels_NP.shape)}"
            )
        everything = np.arange(self.num_cells, dtype=np.int32)
        self._moved = np.ones(self.num_cells, np.bool_)
        known = self._pixels is not None and self._pixels.shape == pixels_NP.shape
        if not known or size != self._size or self.rule.threshold == 0.0:
            return everything
        assert self._pixels is not None
        differences = patch_differences(pixels_NP, self._pixels)
        changed_N = differences >= self.rule.threshold
        other_N = differences >= min(self.rule.threshold, CUT_LEVELS)
        self._moved = np.any(other_N[self._patches], axis=1)
        share = float(self._moved.mean())
        if share >= max(self._recent, default=0.0) + SUDDEN:
            return everything
        others = (self._changed_since | self._moved).mean(1)
        wanted = touched(changed_N)[self._patches].any(1) | (others >= MOST_CHANGED)
        wanted[self._due(wanted)] = True
        wanted |= self._ages + 1 >= self.rule.refresh_frames  # after that became less
        cells: Cells = np.flatnonzero(wanted).astype(np.int32)
        return cells

    def computed(self, pixels_NP: PixelValues, size: tuple[int, int], cells: Cells) -> None:
        """These cells were computed from this frame, which `next` was asked about last."""
        if self._pixels is None or self._pixels.shape != pixels_NP.shape:
            self._pixels = pixels_NP.copy()
        else:
            patches = self._patches[cells].ravel()
            self._pixels[patches] = pixels_NP[patches]
        self._size = size
        share = float(self._moved.mean())
        if share < MOST_CHANGED:
            self._recent.append(share)
        self._changed_since |= self._moved
        self._changed_since[cells] = False
        self._ages += 1
        self._ages[cells] = 0
        self._frames = 0 if len(cells) == self.num_cells else self._frames + 1

    def _due(self, wanted_C: Mask) -> Cells:
        """Of the other cells, those whose turn it is. In any `refresh_frames` frames there are as
        many turns as cells, and the oldest come first."""
        every, count, frame = self.rule.refresh_frames, self.num_cells, self._frames
        turns = -(-(frame + 1) * count // every) + -frame * count // every
        waiting = np.flatnonzero(~wanted_C)
        oldest = np.argsort(-self._ages[waiting], kind="stable")[:turns]
        cells: Cells = waiting[oldest].astype(np.int32)
        return cells


def computed_cells(clips: Iterable[PixelValues], num_cells: int, rule: ReuseRule) -> Mask:
    """Bool [F, C] of clips [T, N, P] that lie end to end, each a stream of its own: the cells that
    are computed of every frame."""
    masks = []
    for clip_TNP in clips:
        stream, size = CellsComputed(num_cells, rule), (1, 1)
        for pixels_NP in clip_TNP:
            cells = stream.next(pixels_NP, size)
            stream.computed(pixels_NP, size, cells)
            masks.append(np.isin(np.arange(num_cells), cells))
    return np.stack(masks)
