"""The one pass over the footage: every picture is scored, and what it came to is written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.duplicates import THUMBNAIL
from edge_vlm.pixels.frames import Rgb, block_means, thumbnail
from edge_vlm.pruning.change import LastKept
from edge_vlm.pruning.policies import FrameDifference, OverThreshold
from edge_vlm.watching import Watcher
from edge_vlm_calibration.footage import pictures
from edge_vlm_calibration.rows import RowFile, score_rows

THRESHOLDS = np.geomspace(1e-4, 1.9, 28)
"""Of change, at which a model that is scored by change is followed."""
VIDEO_SIDE = 1280
"""Pixels of a picture's longer side, as clients send them to models that see less."""


def rows_of(watcher: Watcher) -> np.dtype[Any]:
    """The rows that `look_at` writes."""
    by_change = watcher.config.change is not None
    return score_rows(watcher.config.vision.num_cells, len(THRESHOLDS) if by_change else 0)


def side_of(watcher: Watcher) -> int:
    return max(VIDEO_SIDE, 2 * watcher.config.vision.image_size)


def look_at(
    watcher: Watcher, path: Path, fps: float, file: RowFile, on_frame: Callable[[], None]
) -> None:
    """Goes on behind the rows that `file` has. Raises what `pictures` and the watcher raise."""
    if watcher.config.change is not None:
        file.forget()  # what was last kept at each threshold is not written down
    done = len(file.read())
    num_cells = watcher.config.vision.num_cells
    moved, by_change = _Moved(num_cells), _ByChange(watcher)
    watcher.begin()
    with file.append() as writer:
        for i, picture in enumerate(pictures(path, fps, side_of(watcher))):
            if i < done - 1:
                on_frame()
                continue
            rgb = picture.rgb()
            if picture.is_first:
                watcher.begin()
                moved, by_change = _Moved(num_cells), _ByChange(watcher)
            look = watcher.look(rgb)
            changes = moved.next(rgb)
            if i >= done:  # the last one that was written is looked at again: it is compared with
                if look.scores is None:
                    assert look.scored is not None
                    scores, counts = by_change.next(look.scored)
                else:
                    scores, counts = look.scores, np.empty(0, np.int32)
                small = thumbnail(rgb, THUMBNAIL)
                writer.add((picture.time_s, picture.is_first, small, changes, scores, counts))
            on_frame()


class _Moved:
    """How much the pixels of each cell change from picture to picture."""

    def __init__(self, num_cells: int) -> None:
        self._grid = math.isqrt(num_cells)
        self._before: npt.NDArray[np.float32] | None = None

    def next(self, rgb: Rgb) -> npt.NDArray[np.float32]:
        """f32 [C]; 0 for a first picture."""
        grid, points = self._grid, FrameDifference.POINTS
        means = block_means(rgb.astype(np.float32), grid * points)
        before, self._before = self._before, means
        if before is None:
            return np.zeros(grid * grid, np.float32)
        cells = np.abs(means - before).reshape(grid, points, grid, points, 3)
        found: npt.NDArray[np.float32] = cells.mean((1, 3, 4)).ravel().astype(np.float32)
        return found


class _ByChange:
    """A stream for each threshold of change: what changed depends on what was kept."""

    def __init__(self, watcher: Watcher) -> None:
        self._streams: list[tuple[LastKept, OverThreshold]] = []
        self._whole = LastKept(watcher.config.vision.num_cells)
        if watcher.config.change is not None:
            num_cells = watcher.config.vision.num_cells
            self._streams = [(LastKept(num_cells), OverThreshold(float(t))) for t in THRESHOLDS]

    def next(
        self, scored: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Changes since the picture before f32 [C], and cells kept at each threshold i32 [T]."""
        changes = self._whole.scores(scored)
        self._whole.keep(np.arange(changes.size, dtype=np.int32))
        counts = np.zeros(len(self._streams), np.int32)
        for number, (kept, policy) in enumerate(self._streams):
            scores = kept.scores(scored)
            cells = policy.select(scores, None, is_first=False)
            kept.keep(cells)
            counts[number] = cells.size
        return changes, counts
