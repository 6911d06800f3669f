"""The section `reuse`: what noise does to a patch of the picture that the model sees, and how much
of the footage is computed in front of the scorer if what changes by no more is not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.config import VisionConfig
from edge_vlm.formats.calibrated.reuse import LevelShare, ReuseSection
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.reuse import (
    CUT_LEVELS,
    REFRESH_FRAMES,
    CellsComputed,
    PixelValues,
    ReuseRule,
    patch_differences,
)
from edge_vlm_calibration.footage import pictures
from edge_vlm_calibration.noise.change import LEAST_FRAMES, Stretch
from edge_vlm_calibration.rows import Rows
from edge_vlm_calibration.simulate import duplicates_of

LEVELS = (2.0, 4.0, 8.0, 12.0)
"""Grey levels that are tried in any case."""
LAGS = (1, 2, 4, 8, 16, REFRESH_FRAMES - 1)
"""A cell's state is at most so many frames old."""
QUANTILE = 0.999
MARGIN = 1.25
"""A patch is the mean of hundreds of pixels, so noise hardly goes beyond its quantile; more than
that would be blind to what is small."""
LEAST_LEVEL = 1.0
MOSTLY = 0.6
"""Share from which on there is little to save."""


def reuse_section(
    clips: Mapping[str, Path],
    rows: Mapping[str, Rows],
    still: Stretch | None,
    settings: Mapping[str, Any],
    vision: VisionConfig,
    fps: float,
    max_side: int,
    on_frame: Callable[[], None],
) -> tuple[ReuseSection, list[str]]:
    """And notes for whoever reads it. `rows` are those of the clips' pictures, `settings` decide
    which of these a session drops as duplicates. `on_frame` is called for each picture, and once
    more for those of the still stretch. Raises as `pictures`."""
    notes: list[str] = []
    floor = chosen = None
    if still is not None:
        path = clips[still.clip]
        floor = _floor(path, still, vision, fps, max_side, on_frame)
        chosen = round(max(LEAST_LEVEL, MARGIN * floor), 1)
    if still is None:
        notes.append(
            f"nowhere does the footage stand still for {LEAST_FRAMES} frames, so noise cannot be "
            "told from motion and no level is chosen; a minute of the empty scene would do"
        )
    elif chosen is not None and chosen >= CUT_LEVELS:
        notes.append(
            f"noise alone changes a patch by {floor:.1f} levels, as much as another picture would "
            f"({CUT_LEVELS:g}): no level is chosen; more light or a lower gain of the camera would "
            "help"
        )
        chosen = None
    levels = sorted({*LEVELS, *([] if chosen is None else [chosen])})
    computed = np.zeros(len(levels), np.int64)
    seen = 0
    for name, path in clips.items():
        dropped = duplicates_of(rows[name], settings)
        counts, cells = _computed(path, dropped, levels, vision, fps, max_side, on_frame)
        computed += counts
        seen += cells
    shares = [
        LevelShare(level=level, share=count / seen)
        for level, count in zip(levels, computed.tolist(), strict=True)
    ]
    found = next((each.share for each in shares if each.level == chosen), 0.0)
    if found >= MOSTLY:
        notes.append(
            f"with {chosen:g} levels {found:.0%} of the cells change or stand beside some that do: "
            "there is little to save here"
        )
    section = ReuseSection(
        settings={} if chosen is None else {"reuse": chosen},
        still=None if still is None else still.told,
        patch_floor=None if floor is None else round(floor, 3),
        frames=seen // vision.num_cells,
        shares=tuple(shares),
    )
    return section, notes


def _floor(
    path: Path,
    still: Stretch,
    vision: VisionConfig,
    fps: float,
    max_side: int,
    on_frame: Callable[[], None],
) -> float:
    """The change in grey levels that 999 of 1,000 patches stay below where nothing happens."""
    before: deque[PixelValues] = deque(maxlen=max(LAGS))
    found: list[npt.NDArray[np.float32]] = []
    end = still.begin + len(still.rows)
    for picture in islice(pictures(path, fps, max_side), still.begin, end):
        pixels = to_pixel_values(picture.rgb(), vision)
        found += [patch_differences(pixels, before[-lag]) for lag in LAGS if lag <= len(before)]
        before.append(pixels)
        on_frame()
    return float(np.quantile(np.concatenate(found), QUANTILE))


def _computed(
    path: Path,
    dropped: npt.NDArray[np.bool_],
    levels: list[float],
    vision: VisionConfig,
    fps: float,
    max_side: int,
    on_frame: Callable[[], None],
) -> tuple[npt.NDArray[np.int64], int]:
    """Cells that a session computes at each level, and those of all frames it takes."""
    counts, frames = np.zeros(len(levels), np.int64), 0
    streams: list[CellsComputed] = []
    for is_dropped, picture in zip(dropped.tolist(), pictures(path, fps, max_side), strict=False):
        on_frame()
        if picture.is_first:
            rules = [ReuseRule(threshold=level) for level in levels]
            streams = [CellsComputed(vision.num_cells, rule) for rule in rules]
        if is_dropped:
            continue
        rgb = picture.rgb()
        pixels, size = to_pixel_values(rgb, vision), (rgb.shape[0], rgb.shape[1])
        for number, stream in enumerate(streams):
            cells = stream.next(pixels, size)
            stream.computed(pixels, size, cells)
            counts[number] += len(cells)
        frames += 1
    return counts, frames * vision.num_cells
