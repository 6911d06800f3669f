"""The section `budget`: the settings of a session that hold the wanted share or rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.formats.calibrated.budget import BudgetSection, ClipShare, CurvePoint, RatioPoint
from edge_vlm_calibration.looking import THRESHOLDS
from edge_vlm_calibration.rows import Rows
from edge_vlm_calibration.simulate import (
    DEFAULTS,
    Spent,
    duplicates_of,
    simulate,
    simulate_all,
)

RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
PAYBACKS, BANKS, CEILINGS = (8, 16, 32), (1.0, 2.0, 4.0, 8.0), (0.75, 0.5)
LEAST_STREAM = 4 * max(PAYBACKS)
"""Frames: in shorter ones the whole first frame says more than what follows."""
LEAST_SIZED = 2 * max(PAYBACKS[:2])
"""Frames of the longest stretch from which the budget is corrected by what the footage comes to."""
GAIN = 0.01
"""Other than usual settings are taken where the kept cells score so much more of all scores."""
TOLERANCE = 0.005
SEARCH_FRAMES = 4000
"""The first frames of the footage, from every clip its part, that settings are tried on."""
CURVE_POINTS = 40
MOST_SCORES = 2_000_000
UNIT = {"keep_ratio": "of the cells", "vision_tokens_per_s": "cells a second"}


@dataclass(frozen=True)
class Wanted:
    """What the footage should cost: a share of its cells, or cells a second."""

    name: str
    """keep_ratio or vision_tokens_per_s"""
    value: float

    def of(self, spent: Spent) -> float:
        return spent.share if self.name == "keep_ratio" else spent.per_s

    def settings(self, value: float) -> dict[str, float]:
        return {self.name: value}


def budget_section(
    clips: Mapping[str, Rows],
    wanted: Wanted,
    base: Mapping[str, Any],
    scorer: str,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[BudgetSection, list[str]]:
    """And notes. `base`: settings that stand already: fps_cap, and those of noise."""
    notes: list[str] = []
    fps = float(base["fps_cap"])
    frame_s = 1.0 / fps
    every = list(clips.values())
    part = _part(every)
    if part is not every:
        notes.append(
            f"settings were tried on {sum(map(len, part)):,} of {sum(map(len, every)):,} frames, "
            "the first of each clip; the shares are those of all"
        )
    if scorer == "change":
        chosen, found = _by_threshold(every, wanted, base, frame_s)
        notes += found
        shares = [_changed(rows, chosen, base, frame_s) for rows in every]
        ratios: list[RatioPoint] = []
    else:
        chosen, found = _by_budget(part, wanted, base, scorer, frame_s, on_step)
        notes += found
        shares = [simulate(rows, {**base, **chosen}, frame_s) for rows in every]
        ratios = _ratios(part, base, chosen, frame_s, on_step)
    total = Spent()
    for spent in shares:
        total.add(spent)
    scores = _scores(every)
    held = wanted.of(total)
    if abs(held - wanted.value) > max(TOLERANCE, 0.02 * wanted.value):
        notes.append(
            f"{wanted.value:g} {UNIT[wanted.name]} cannot be held on this footage: {held:.4g} is "
            "what the settings come to (whole first frames, a floor of cells, all cells there are)"
        )
    section = BudgetSection(
        wanted={wanted.name: wanted.value},
        fps=fps,
        settings={**chosen, "fps_cap": fps},
        share=total.share,
        per_s=total.per_s,
        clips=tuple(
            ClipShare(
                name=name,
                frames=spent.frames,
                duplicates=spent.duplicates,
                seconds=spent.seconds,
                predicted_share=spent.share,
                predicted_per_s=spent.per_s,
            )
            for name, spent in zip(clips, shares, strict=True)
        ),
        score_mean=float(scores.mean()) if scores.size else 0.0,
        score_std=float(scores.std()) if scores.size else 0.0,
        curve=tuple(_change_curve(every) if scorer == "change" else _curve(scores, scorer)),
        ratios=tuple(ratios),
        kept_map=_map(total.kept_map, total.frames - total.duplicates),
        score_map=_score_map(every),
    )
    return section, notes


# ---- by a budget -----------------------------------------------------------------------------


def _by_budget(
    clips: Sequence[Rows],
    wanted: Wanted,
    base: Mapping[str, Any],
    scorer: str,
    frame_s: float,
    on_step: Callable[[], None],
) -> tuple[dict[str, Any], list[str]]:
    """Settings, and notes. First how a budget is spent, then how large it is."""

    def tried(settings: Mapping[str, Any]) -> Spent:
        on_step()
        return simulate_all(clips, {**base, **settings}, frame_s)

    num_cells = clips[0].dtype["scores"].shape[0]
    usual: dict[str, Any] = {
        "policy": "difference" if scorer == "none" else "stream",
        **wanted.settings(wanted.value),
        "min_cells": min(int(DEFAULTS["min_cells"]), num_cells),
        "max_cells": 0,
        "payback_frames": DEFAULTS["payback_frames"],
        "bank_frames": DEFAULTS["bank_frames"],
    }
    best, best_score = usual, tried(usual).score_share
    notes: list[str] = []
    longest = max(map(_longest_stream, clips))
    if scorer != "none" and longest < LEAST_STREAM:
        notes.append(
            f"the longest stretch has {longest} frames: payback, bank and ceiling stay as usual, "
            f"choosing them takes {LEAST_STREAM}"
        )
    elif scorer != "none":
        options = [{"payback_frames": p, "bank_frames": b} for p in PAYBACKS for b in BANKS]
        for option in options:
            best, best_score = _better(best, best_score, {**usual, **option}, tried)
        # A ceiling keeps the dearest frame cheap, so it is taken where it costs nothing.
        for share in CEILINGS:
            ceiling = {**best, "max_cells": max(math.ceil(share * num_cells), best["min_cells"])}
            if tried(ceiling).score_share >= best_score * (1 - GAIN / 2):
                best = ceiling
    size = wanted.value
    if longest >= LEAST_SIZED:
        size = _size(wanted, best, tried)
    else:
        notes.append(
            f"in stretches of {longest} frames the whole first one weighs more than it does in a "
            "stream that goes on: the budget is what was asked for"
        )
    if wanted.name == "vision_tokens_per_s" and wanted.value * frame_s > num_cells:
        notes.append(
            f"{wanted.value:g} cells a second are more than there are: {num_cells / frame_s:g} at "
            f"{1 / frame_s:g} frames a second"
        )
    return {**best, **wanted.settings(size)}, notes


def _longest_stream(rows: Rows) -> int:
    firsts = [*np.flatnonzero(rows["first"]).tolist(), len(rows)]
    return int(np.diff(firsts).max(initial=0))


def _better(
    best: dict[str, Any],
    best_score: float,
    other: dict[str, Any],
    tried: Callable[[Mapping[str, Any]], Spent],
) -> tuple[dict[str, Any], float]:
    score = tried(other).score_share
    return (other, score) if score > best_score * (1 + GAIN) else (best, best_score)


def _size(
    wanted: Wanted, settings: Mapping[str, Any], tried: Callable[[Mapping[str, Any]], Spent]
) -> float:
    """The budget with which the footage comes to what is wanted; bisection, as cost rises with
    it."""

    def cost(value: float) -> float:
        return wanted.of(tried({**settings, **wanted.settings(value)}))

    most = 1.0 if wanted.name == "keep_ratio" else 4 * wanted.value
    near = max(TOLERANCE / 2, 0.005 * wanted.value)
    found = cost(wanted.value)
    if abs(found - wanted.value) <= near:
        return wanted.value
    low, high = (wanted.value, most) if found < wanted.value else (wanted.value / 50, wanted.value)
    best, best_gap = wanted.value, abs(found - wanted.value)
    for _ in range(8):
        middle = (low + high) / 2
        found = cost(middle)
        if (gap := abs(found - wanted.value)) < best_gap:
            best, best_gap = middle, gap
        if gap <= near:
            break
        low, high = (middle, high) if found < wanted.value else (low, middle)
    return round(best, 4)


def _ratios(
    clips: Sequence[Rows],
    base: Mapping[str, Any],
    chosen: Mapping[str, Any],
    frame_s: float,
    on_step: Callable[[], None],
) -> list[RatioPoint]:
    points = []
    for ratio in RATIOS:
        settings = {**base, **chosen, "keep_ratio": ratio, "vision_tokens_per_s": 0.0}
        spent = simulate_all(clips, settings, frame_s)
        on_step()
        points.append(
            RatioPoint(
                keep_ratio=ratio,
                share=spent.share,
                per_s=spent.per_s,
                score_share=spent.score_share,
            )
        )
    return points


# ---- by a threshold of change ----------------------------------------------------------------


def _by_threshold(
    clips: Sequence[Rows], wanted: Wanted, base: Mapping[str, Any], frame_s: float
) -> tuple[dict[str, Any], list[str]]:
    costs = [wanted.of(_at(clips, number, base, frame_s)) for number in range(len(THRESHOLDS))]
    below = [number for number, cost in enumerate(costs) if cost <= wanted.value]
    if not below:
        number: float = len(costs) - 1
    elif below[0] == 0:
        number = 0
    else:  # between the two, by the logarithm of the threshold
        last, first = costs[below[0] - 1], costs[below[0]]
        number = below[0] - (wanted.value - first) / max(last - first, 1e-9)
    places = np.arange(len(THRESHOLDS))
    threshold = float(np.exp(np.interp(number, places, np.log(THRESHOLDS))))
    settings = {
        "policy": "stream",
        "change_threshold": float(f"{threshold:.4g}"),
        "min_cells": DEFAULTS["min_cells"],
    }
    return settings, []


def _at(clips: Sequence[Rows], number: int, base: Mapping[str, Any], frame_s: float) -> Spent:
    total = Spent()
    for rows in clips:
        total.add(_counted(rows, rows["counts"][:, number], base, frame_s))
    return total


def _changed(
    rows: Rows, chosen: Mapping[str, Any], base: Mapping[str, Any], frame_s: float
) -> Spent:
    """A clip at a threshold between those that were followed."""
    wanted = math.log(chosen["change_threshold"])
    place = float(np.interp(wanted, np.log(THRESHOLDS), np.arange(len(THRESHOLDS))))
    low, high = math.floor(place), math.ceil(place)
    columns: npt.NDArray[Any] = rows["counts"]
    counts = columns[:, low] * (1 - (place - low)) + columns[:, high] * (place - low)
    return _counted(rows, counts, base, frame_s)


def _counted(
    rows: Rows, counts: npt.NDArray[Any], base: Mapping[str, Any], frame_s: float
) -> Spent:
    num_cells = rows.dtype["scores"].shape[0]
    dropped = duplicates_of(rows, base)
    firsts = int(rows["first"].sum())
    steps = np.diff(rows["time_s"])[~rows["first"][1:]]
    return Spent(
        frames=len(rows),
        duplicates=int(dropped.sum()),
        seen=int((~dropped).sum()) * num_cells,
        kept=round(float(np.asarray(counts)[~dropped].sum())),
        seconds=float(steps.sum()) + firsts * frame_s,
        kept_map=np.zeros(num_cells),
    )


def _change_curve(clips: Sequence[Rows]) -> list[CurvePoint]:
    later = [np.array(rows["counts"][~rows["first"]]) for rows in clips]
    counts = np.concatenate(later)
    num_cells = clips[0].dtype["scores"].shape[0]
    if not len(counts):
        return []
    shares = counts.mean(axis=0) / num_cells
    return [
        CurvePoint(threshold=float(f"{t:.4g}"), share=float(share))
        for t, share in zip(THRESHOLDS, shares, strict=True)
    ]


# ---- of the scores ---------------------------------------------------------------------------


def _part(clips: list[Rows]) -> list[Rows]:
    total = sum(map(len, clips))
    if total <= SEARCH_FRAMES:
        return clips
    return [rows[: max(2, len(rows) * SEARCH_FRAMES // total)] for rows in clips]


def _scores(clips: Sequence[Rows]) -> npt.NDArray[np.float32]:
    """Of frames after a first one, evenly thinned where they are many."""
    num_cells = clips[0].dtype["scores"].shape[0]
    step = max(1, math.ceil(sum(map(len, clips)) * num_cells / MOST_SCORES))
    parts = []
    for rows in clips:
        some = rows[::step]
        parts.append(np.array(some["scores"][~some["first"]]).ravel())
    return np.concatenate(parts)


def _curve(scores: npt.NDArray[np.float32], scorer: str) -> list[CurvePoint]:
    if scorer == "none" or not scores.size:
        return []
    ordered = np.sort(scores)
    points = []
    for share in np.linspace(1.0, 0.0, CURVE_POINTS, endpoint=False):
        count = max(1, math.ceil(share * ordered.size - 1e-6))
        threshold = float(ordered[-count])
        points.append(CurvePoint(threshold=threshold, share=float((ordered >= threshold).mean())))
    return points


def threshold_at(curve: Sequence[CurvePoint], share: float) -> float | None:
    """The score at or above which about this share of cells lies."""
    near = [point for point in curve if point.share >= share]
    return min(near, key=lambda point: point.share).threshold if near else None


def _map(counts: npt.NDArray[np.float64], frames: int) -> tuple[float, ...]:
    if not frames or not counts.any():
        return ()
    return tuple(round(float(count) / frames, 4) for count in counts)


def _score_map(clips: Sequence[Rows]) -> tuple[float, ...]:
    total = np.zeros(clips[0].dtype["scores"].shape[0])
    frames = 0
    for rows in clips:
        for begin in range(0, len(rows), 256):
            block = np.array(rows[begin : begin + 256])
            later = block["scores"][~block["first"]]
            total += later.sum(axis=0)
            frames += len(later)
    return tuple(round(float(x) / frames, 6) for x in total) if frames else ()
