"""A live session's choice of cells over scores that were taken down: without the model, exactly.

Scores of a learned scorer depend on this picture and the one before, not on what was kept, so any
settings can be tried on the same scores. (Where duplicates are dropped, the picture before is
another; they look alike, and the measured share says how much that matters.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.duplicates import DuplicateFilter
from edge_vlm.pruning.policies import (
    PAYBACK_FRAMES,
    OverThreshold,
    RatedPolicy,
    Scores,
    make_policy,
)
from edge_vlm_calibration.rows import Rows

HEARTBEAT_S = 10.0
DUPLICATE_THRESHOLD = 6.0
"""As sessions have them by default; a test holds this to them."""
EWMA_WEIGHT = 0.2
DEFAULTS: Mapping[str, Any] = {
    "policy": "stream",
    "keep_ratio": 0.5,
    "vision_tokens_per_s": 0.0,
    "change_threshold": 0.0,
    "min_cells": 2,
    "max_cells": 0,
    "payback_frames": PAYBACK_FRAMES,
    "bank_frames": 2.0,
    "fps_cap": 2.0,
    "drop_duplicates": True,
    "duplicate_threshold": DUPLICATE_THRESHOLD,
    "heartbeat_s": HEARTBEAT_S,
}


class BudgetedStream:
    """The policy of one stream under a session's settings, funded by time where they say so."""

    def __init__(self, settings: Mapping[str, Any], num_cells: int) -> None:
        wanted = {**DEFAULTS, **settings}
        self._per_s = float(wanted["vision_tokens_per_s"])
        self._interval_s = 1.0 / wanted["fps_cap"]
        self._last_s: float | None = None
        keep_ratio = wanted["keep_ratio"]
        if self._per_s:
            keep_ratio = min(1.0, self._per_s / (wanted["fps_cap"] * num_cells))
        self._policy: RatedPolicy
        if wanted["change_threshold"]:
            self._policy = OverThreshold(wanted["change_threshold"], wanted["min_cells"])
        else:
            self._policy = make_policy(
                wanted["policy"],
                keep_ratio,
                min_cells=wanted["min_cells"],
                max_cells=wanted["max_cells"],
                payback_frames=wanted["payback_frames"],
                bank_frames=wanted["bank_frames"],
            )

    @property
    def is_new(self) -> bool:
        """Nothing was encoded yet."""
        return self._last_s is None

    def select(
        self, scores: Scores, time_s: float, rgb: npt.NDArray[np.uint8] | None = None
    ) -> npt.NDArray[np.int32]:
        """Kept cells i32 [K] of the next encoded picture."""
        is_first = self._last_s is None
        if self._per_s:
            since_s = self._interval_s
            if self._last_s is not None:
                since_s = time_s - self._last_s
                self._interval_s += EWMA_WEIGHT * (since_s - self._interval_s)
            self._policy.set_rate(self._per_s * since_s, self._per_s * self._interval_s)
        self._last_s = time_s
        return self._policy.select(scores, rgb, is_first)


@dataclass
class Spent:
    """What a stream cost."""

    frames: int = 0
    duplicates: int = 0
    seen: int = 0
    kept: int = 0
    seconds: float = 0.0
    score_sum: float = 0.0
    kept_score: float = 0.0
    kept_map: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Encoded frames in which each cell was kept, [C]."""
    most: int = 0
    """Cells of the dearest frame after the first."""

    @property
    def share(self) -> float:
        return self.kept / self.seen if self.seen else 0.0

    @property
    def per_s(self) -> float:
        return self.kept / self.seconds if self.seconds else 0.0

    @property
    def score_share(self) -> float:
        return self.kept_score / self.score_sum if self.score_sum else 0.0

    def add(self, other: Spent) -> None:
        if not self.kept_map.size:
            self.kept_map = np.zeros_like(other.kept_map)
        for name in ("frames", "duplicates", "seen", "kept", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.score_sum += other.score_sum
        self.kept_score += other.kept_score
        self.kept_map = self.kept_map + other.kept_map
        self.most = max(self.most, other.most)


def simulate(
    rows: Rows, settings: Mapping[str, Any], frame_s: float, most: int | None = None
) -> Spent:
    """One clip's rows, or the first `most` of them; of several streams in it each begins anew.

    `frame_s`: how long a stream's last picture is shown."""
    wanted = {**DEFAULTS, **settings}
    if wanted["policy"] == "difference":  # chooses by pixels; how many does not depend on them
        wanted["policy"] = "frame_topk"
    num_cells = rows.dtype["scores"].shape[0]
    spent = Spent(kept_map=np.zeros(num_cells))
    stream, filtered = BudgetedStream(wanted, num_cells), _Filtered(wanted)
    for row in by_block(rows[:most]):
        time_s, scores = float(row["time_s"]), row["scores"]
        if row["first"]:
            stream, filtered = BudgetedStream(wanted, num_cells), _Filtered(wanted)
            spent.seconds += frame_s
            last_s = time_s
        spent.seconds += time_s - last_s
        last_s = time_s
        spent.frames += 1
        if filtered.is_duplicate(row["thumb"], time_s):
            spent.duplicates += 1
            continue
        is_first = stream.is_new
        cells = stream.select(scores, time_s)
        spent.seen += num_cells
        spent.kept += cells.size
        spent.kept_map[cells] += 1
        if not is_first:
            spent.most = max(spent.most, cells.size)
            spent.score_sum += float(scores.sum())
            spent.kept_score += float(scores[cells].sum())
    return spent


class _Filtered:
    """The near-duplicates of one stream."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._filter = settings, DuplicateFilter()

    def is_duplicate(self, thumb: npt.NDArray[np.float32], time_s: float) -> bool:
        settings, capture_us = self._settings, round(time_s * 1e6)
        if settings["drop_duplicates"] and self._filter.is_duplicate(
            thumb, capture_us, settings["duplicate_threshold"], settings["heartbeat_s"]
        ):
            return True
        self._filter.on_encoded(thumb, capture_us)
        return False


def duplicates_of(rows: Rows, settings: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Which frames of a clip a live session drops, bool [F]."""
    wanted = {**DEFAULTS, **settings}
    found = np.zeros(len(rows), np.bool_)
    filtered = _Filtered(wanted)
    for i, row in enumerate(by_block(rows)):
        if row["first"]:
            filtered = _Filtered(wanted)
        found[i] = filtered.is_duplicate(row["thumb"], float(row["time_s"]))
    return found


def by_block(rows: Rows, size: int = 256) -> Iterator[Any]:
    """Row by row; of a mapped file a block at a time is in memory."""
    for begin in range(0, len(rows), size):
        yield from np.array(rows[begin : begin + size])


def simulate_all(clips: Sequence[Rows], settings: Mapping[str, Any], frame_s: float) -> Spent:
    """All clips together, each a stream of its own."""
    total = Spent()
    for rows in clips:
        total.add(simulate(rows, settings, frame_s))
    return total
