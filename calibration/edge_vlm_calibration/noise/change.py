"""The section `change`: where the footage stands still, what changes is the camera's own noise."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_vlm.formats.calibrated.change import ChangeSection, StillStretch
from edge_vlm_calibration.rows import Rows
from edge_vlm_calibration.simulate import DUPLICATE_THRESHOLD, HEARTBEAT_S, duplicates_of

LONGEST_S = 60.0
LEAST_FRAMES = 8
STILL_LIMIT = 12.0
"""A larger change of a thumbnail's point, each the mean of many pixels, is no camera's noise."""
MARGIN = 1.5
LEAST_THRESHOLD = 1.0
QUANTILE = 0.999
ONE_COLOUR = 2.0
"""Spread (0..255) of a thumbnail that shows nothing."""


@dataclass(frozen=True)
class Stretch:
    """Where a clip stands still."""

    clip: str
    begin: int
    """Which of the clip's rows is the first..."""
    rows: Rows
    """...of these, thumbnails and times in memory."""
    noise: float
    grows: bool
    """What changes grows with time: something moves."""

    @property
    def told(self) -> StillStretch:
        times_s = self.rows["time_s"]
        return StillStretch(
            clip=self.clip,
            begin_s=round(float(times_s[0]), 3),
            end_s=round(float(times_s[-1]), 3),
            frames=len(self.rows),
        )


def stillest(clips: Mapping[str, Rows]) -> Stretch | None:
    """Where nothing changes but noise; None where something always moves."""
    found = [stretch for name, rows in clips.items() for stretch in _stretches(name, rows)]
    still = [each for each in found if not each.grows and each.noise <= STILL_LIMIT]
    return min(still, key=lambda each: each.noise) if still else None


def change_section(
    clips: Mapping[str, Rows], best: Stretch | None, scorer: str
) -> tuple[ChangeSection, list[str]]:
    """And notes for whoever reads it. `best` is the `stillest` of them."""
    notes: list[str] = []
    settings: dict[str, float | bool] = {}
    pixel_floor = score_floor = noise = None
    stretch: StillStretch | None = None
    before = _dropped(clips, DUPLICATE_THRESHOLD)
    after = before
    if best is None:
        notes.append(
            f"nowhere does the footage stand still for {LEAST_FRAMES} frames: the camera's noise "
            f"cannot be told from motion: the usual duplicate threshold {DUPLICATE_THRESHOLD:g} "
            "stays; a minute of the empty scene would do"
        )
    else:
        noise = round(best.noise, 3)
        threshold = round(max(LEAST_THRESHOLD, MARGIN * best.noise), 2)
        settings = {"drop_duplicates": True, "duplicate_threshold": threshold}
        after = _dropped(clips, threshold)
        rows = best.rows[1:]  # against the picture before
        pixel_floor = round(float(np.quantile(rows["moved"], QUANTILE)), 4)
        if scorer != "none":
            score_floor = round(float(np.quantile(rows["scores"], QUANTILE)), 6)
        stretch = best.told
    moving = _moving_share(list(clips.values()), MARGIN * (pixel_floor or 0.0))
    if best is not None and moving < 2 * (1 - QUANTILE):
        notes.append(
            "nothing moves in the footage beyond the camera's noise: what follows is of a still "
            "scene; watch footage in which things happen, too"
        )
    section = ChangeSection(
        settings=settings,
        still=stretch,
        noise=noise,
        duplicate_share=after,
        duplicate_share_before=before,
        pixel_floor=pixel_floor,
        score_floor=score_floor,
        scorer=scorer,
        moving_share=moving,
    )
    return section, notes


def _stretches(clip: str, rows: Rows) -> list[Stretch]:
    """The stillest part of each stream of a clip: a fifth of it, a minute at most."""
    firsts = [*np.flatnonzero(rows["first"]).tolist(), len(rows)]
    found = []
    for begin, end in itertools.pairwise(firsts):
        if end - begin < LEAST_FRAMES:
            continue
        times_s = np.array(rows["time_s"][begin:end])
        step_s = float(times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1)
        size = max(LEAST_FRAMES, min((end - begin) // 5, int(LONGEST_S / max(step_s, 1e-6))))
        steps = np.array(
            [
                float(np.abs(np.asarray(rows["thumb"][i]) - rows["thumb"][i - 1]).max())
                for i in range(begin + 1, end)
            ]
        )
        worst = np.lib.stride_tricks.sliding_window_view(steps, size - 1).max(axis=1)
        start = begin + int(worst.argmin())
        chosen = np.array(rows[start : start + size])
        noise, grows = _noise(chosen["thumb"], max(1, round(HEARTBEAT_S / max(step_s, 1e-6))))
        found.append(Stretch(clip, start, chosen, noise, grows))
    return found


def _noise(thumbs: npt.NDArray[np.float32], longest: int) -> tuple[float, bool]:
    """Largest change of a point between pictures up to `longest` apart, and whether it grows with
    their distance, as motion does and noise does not."""
    lags = range(1, min(longest, len(thumbs) - 1) + 1)
    largest = [float(np.abs(thumbs[lag:] - thumbs[:-lag]).max()) for lag in lags]
    typical = [float(np.abs(thumbs[lag:] - thumbs[:-lag]).max(axis=(1, 2)).mean()) for lag in lags]
    grows = typical[-1] > 2 * typical[0] + 1.0
    return max(largest), grows


def _dropped(clips: Mapping[str, Rows], threshold: float) -> float:
    settings = {"duplicate_threshold": threshold}
    dropped = sum(int(duplicates_of(rows, settings).sum()) for rows in clips.values())
    return dropped / max(sum(len(rows) for rows in clips.values()), 1)


def _moving_share(clips: Sequence[Rows], floor: float) -> float:
    moving = seen = 0
    for rows in clips:
        for begin in range(0, len(rows), 256):
            block = np.array(rows[begin : begin + 256])
            later = block["moved"][~block["first"]]
            moving += int((later > floor).sum())
            seen += later.size
    return moving / seen if seen else 0.0


def shows_nothing(rows: Rows) -> bool:
    """All of a clip is of one colour."""
    return all(float(np.asarray(rows["thumb"][i]).std()) < ONE_COLOUR for i in range(0, len(rows)))
