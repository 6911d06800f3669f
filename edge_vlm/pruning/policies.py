"""Which cells of a frame are kept: one family of policies, from scores to cell numbers, in numpy.

A policy sees the frames of one stream in order and answers at once, so it never looks ahead (what
wants the whole clip first is `edge_vlm.pruning.clip_budget`). All causal policies spend by the same
`CellLedger`: comparing them compares *which* cells they choose, at equal cost.

Scores are small and their scale drifts (their mean is about 0.05), so nothing here compares them
with a fixed number: they are ranked against the recent past of their own stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.frames import Rgb, block_means
from edge_vlm.pruning.ledger import CellLedger

Scores = npt.NDArray[np.float32]
Cells = npt.NDArray[np.int32]


PAYBACK_FRAMES = 16
"""Over how many frames a stream pays back its whole first frame. Over fewer, a small budget starves
them: at 0.2 of sixteen cells, eight frames leave 1.4 cells a frame and sixteen leave 2.3."""


class KeepPolicy(Protocol):
    """State of one stream. Never share one between streams."""

    def reset(self) -> None:
        """Forget the stream: the next frame is a first frame again."""

    def select(self, scores: Scores, frame_rgb: Rgb | None, is_first: bool) -> Cells:
        """Scores f32 [C] -> kept cells i32 [K], sorted.

        `frame_rgb` u8 [H, W, 3]: only FrameDifference looks at it. On a first frame every cell is
        kept. Raises ValueError on scores that are not [C] or not finite.
        """


class RatedPolicy(KeepPolicy, Protocol):
    """One whose budget can be changed while the stream runs."""

    def set_rate(self, coming: float, later: float) -> None:
        """What the budget gets with the coming frame, and with each later one as far as is known,
        in cells. Without it every frame brings `keep_ratio` of its cells."""


def _checked(scores: Scores) -> Scores:
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"scores must be [C], got {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity")
    return scores.astype(np.float32, copy=False)


def _check_ratio(keep_ratio: float) -> None:
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")


def top_cells(scores: Scores, count: int) -> Cells:
    """Cell numbers of the `count` highest scores, i32 [count], sorted; ties go to lower numbers."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order).astype(np.int32)


class KeepAll:
    """No pruning."""

    def reset(self) -> None:
        """Nothing to forget."""

    def set_rate(self, coming: float, later: float) -> None:
        """All cells are kept, whatever the budget."""

    def select(self, scores: Scores, frame_rgb: Rgb | None, is_first: bool) -> Cells:
        return np.arange(_checked(scores).size, dtype=np.int32)


@dataclass(eq=False)
class _Budgeted(ABC):
    """What the causal policies share: the ledger, the whole first frame, the ceiling."""

    keep_ratio: float
    _: KW_ONLY
    min_cells: int = 2
    payback_frames: int = PAYBACK_FRAMES
    bank_frames: float = 2.0
    max_cells: int = 0
    """Most that a later frame keeps; 0: all of them."""

    def __post_init__(self) -> None:
        _check_ratio(self.keep_ratio)
        if self.min_cells < 0:
            raise ValueError(f"min_cells must be >= 0, got {self.min_cells}")
        if self.max_cells and self.max_cells < self.min_cells:
            raise ValueError(f"max_cells must be 0 or at least min_cells, got {self.max_cells}")
        if self.bank_frames < 0:
            raise ValueError(f"bank_frames must be >= 0, got {self.bank_frames}")
        if self.payback_frames < 2:
            raise ValueError(f"payback_frames must be >= 2, got {self.payback_frames}")
        self._ledger: CellLedger | None = None
        self._rates: tuple[float, float] | None = None

    def reset(self) -> None:
        self._ledger = None

    def set_rate(self, coming: float, later: float) -> None:
        if not (coming >= 0.0 and later >= 0.0):
            raise ValueError(f"cells to spend must be >= 0, got {coming} and {later}")
        self._rates = (coming, later)

    def select(self, scores: Scores, frame_rgb: Rgb | None, is_first: bool) -> Cells:
        scores = _checked(scores)
        if is_first or self._ledger is None:
            self.reset()
            self._ledger = CellLedger(
                scores.size,
                self.keep_ratio,
                self.payback_frames,
                self.min_cells,
                self.bank_frames,
            )
            self._start(scores, frame_rgb)
            self._apply_rates(self._ledger)
            cells = np.arange(scores.size, dtype=np.int32)
        else:
            if scores.size != self._ledger.num_cells:
                raise ValueError(
                    f"scores changed from {self._ledger.num_cells} to {scores.size} cells"
                )
            self._apply_rates(self._ledger)
            if self._pays_for_all(self._ledger):  # nothing is pruned, however low it scores
                self._start(scores, frame_rgb)
                cells = np.arange(scores.size, dtype=np.int32)
            else:
                cells = self._choose(scores, frame_rgb, self._ledger)
        self._ledger.spend(cells.size)
        return cells

    def _pays_for_all(self, ledger: CellLedger) -> bool:
        """Of every coming frame, as far as is known, and of this one, which may have less."""
        most = min(self.max_cells or ledger.num_cells, ledger.rate, ledger.available())
        return most >= ledger.num_cells

    def _apply_rates(self, ledger: CellLedger) -> None:
        if self._rates is not None:
            coming, later = self._rates
            ledger.set_rate(coming, later)
            self._rates = (later, later)

    def _start(self, scores: Scores, frame_rgb: Rgb | None) -> None:  # noqa: B027 (optional)
        """This frame is kept whole: the first of a stream, or one of a budget for everything."""

    @abstractmethod
    def _choose(self, scores: Scores, frame_rgb: Rgb | None, ledger: CellLedger) -> Cells:
        """Cells of a later frame, within the ledger, which is charged by the caller."""

    def _bounded(self, wanted: float, ledger: CellLedger) -> int:
        most = min(math.floor(ledger.available()), self.max_cells or ledger.num_cells)
        return max(0, min(max(round(wanted), ledger.min_cells), most, ledger.num_cells))


class FrameTopK(_Budgeted):
    """The highest scores of each frame; every frame gets the same number."""

    def _choose(self, scores: Scores, frame_rgb: Rgb | None, ledger: CellLedger) -> Cells:
        return top_cells(scores, self._bounded(ledger.even_share(), ledger))


@dataclass(eq=False)
class RandomCells(_Budgeted):
    """Uniformly drawn cells: the control arm.

    Every frame gets an even share of the budget that StreamBudget may spend, so never fewer cells
    on average.
    """

    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._random = np.random.default_rng(self.seed)

    def _choose(self, scores: Scores, frame_rgb: Rgb | None, ledger: CellLedger) -> Cells:
        count = self._bounded(ledger.even_share(), ledger)
        return np.sort(self._random.permutation(scores.size)[:count]).astype(np.int32)


@dataclass(eq=False)
class StreamBudget(_Budgeted):
    """Spends a running budget where the scores are high. The default of every live session.

    Cells are ranked by their score and by half of what they are *owed*: their rank one frame
    earlier if they were not kept then, minus half of it if they were. So what scored when there
    was no room is kept when there is some, though it is silent by then (a thing that left is seen
    to be gone), and what was just kept lets others pass (docs/pruning.md).

    A frame *weighs* the sum of its scores' square roots. Of the credit for the next
    `payback_frames` frames it gets its part of their weight, each coming one being expected to
    weigh what the recent ones did on average. So something new takes more than an even share, a
    quiet frame leaves some to the others, no score is compared with a fixed number, and the budget
    is spent whole. The root keeps one event, scored tenfold, from taking a whole second's cells.
    """

    memory_frames: int = field(default=32, kw_only=True)
    _owed: Scores | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_frames < 1:
            raise ValueError(f"memory_frames must be >= 1, got {self.memory_frames}")
        self._recent_weights: deque[float] = deque(maxlen=self.memory_frames)

    def reset(self) -> None:
        super().reset()
        self._recent_weights.clear()

    def _start(self, scores: Scores, frame_rgb: Rgb | None) -> None:
        self._owed = None

    def _choose(self, scores: Scores, frame_rgb: Rgb | None, ledger: CellLedger) -> Cells:
        weight = float(np.sqrt(np.maximum(scores, 0.0)).sum()) + 1e-9  # all 0: an even share
        self._recent_weights.append(weight)
        usual = sum(self._recent_weights) / len(self._recent_weights)

        plan = ledger.frames_to_plan()
        credit = ledger.even_share() * plan
        if ledger.paid_back:
            plan = self.payback_frames
            credit += ledger.rate * (plan - 1)
        wanted = credit * weight / (weight + usual * (plan - 1))
        rank = scores.copy() if self._owed is None else scores + np.float32(0.5) * self._owed
        cells = top_cells(rank, self._bounded(wanted, ledger))
        rank[cells] /= -2
        self._owed = rank
        return cells


class OverThreshold:
    """Every cell whose score is above a fixed number, so the share follows the scene; for scores of
    change, whose scale stays (`edge_vlm.pruning.change`). A later frame keeps `min_cells` in any
    case. No budget bounds it: a cut keeps everything."""

    def __init__(self, threshold: float, min_cells: int = 2) -> None:
        if not threshold >= 0.0 or min_cells < 0:
            raise ValueError(f"threshold and min_cells must be >= 0: {threshold}, {min_cells}")
        self.threshold = threshold
        self.min_cells = min_cells
        self._has_begun = False

    def reset(self) -> None:
        self._has_begun = False

    def set_rate(self, coming: float, later: float) -> None:
        """There is no budget."""

    def select(self, scores: Scores, frame_rgb: Rgb | None, is_first: bool) -> Cells:
        scores = _checked(scores)
        if is_first or not self._has_begun:
            self._has_begun = True
            return np.arange(scores.size, dtype=np.int32)
        count = int((scores > self.threshold).sum())
        return top_cells(scores, max(count, self.min_cells))


class FrameDifference(_Budgeted):
    """Cells whose pixels changed most since they were last *kept*, so slow drift adds up.

    Looks at the picture, not at the scores: the baseline without a learned scorer. Raises
    ValueError when it is not given the picture.
    """

    POINTS = 6
    """Each cell is compared on POINTS x POINTS area-averaged points."""

    _kept_content: npt.NDArray[np.float32] | None = None

    def reset(self) -> None:
        super().reset()
        self._kept_content = None

    def _start(self, scores: Scores, frame_rgb: Rgb | None) -> None:
        self._kept_content = self._cell_contents(scores.size, frame_rgb)

    def _choose(self, scores: Scores, frame_rgb: Rgb | None, ledger: CellLedger) -> Cells:
        contents = self._cell_contents(scores.size, frame_rgb)
        assert self._kept_content is not None  # _start ran with the first frame
        change = np.abs(contents - self._kept_content).mean(axis=1)
        cells = top_cells(change, self._bounded(ledger.even_share(), ledger))
        self._kept_content[cells] = contents[cells]
        return cells

    def _cell_contents(self, num_cells: int, frame_rgb: Rgb | None) -> npt.NDArray[np.float32]:
        """f32 [C, POINTS * POINTS * 3], cells row-major."""
        if frame_rgb is None:
            raise ValueError("FrameDifference needs the picture")
        grid = math.isqrt(num_cells)
        points = self.POINTS
        means = block_means(frame_rgb.astype(np.float32), grid * points)
        cells = means.reshape(grid, points, grid, points, 3).transpose(0, 2, 1, 3, 4)
        return cells.reshape(num_cells, points * points * 3).copy()


POLICY_NAMES = ("stream", "random", "frame_topk", "difference", "keep_all")


def make_policy(
    name: str,
    keep_ratio: float,
    *,
    min_cells: int = 2,
    max_cells: int = 0,
    payback_frames: int = PAYBACK_FRAMES,
    bank_frames: float = 2.0,
    seed: int = 0,
) -> RatedPolicy:
    """A fresh policy by its name in settings. Raises ValueError for a name not in POLICY_NAMES."""
    budget: dict[str, Any] = {"min_cells": min_cells, "max_cells": max_cells}
    budget |= {"payback_frames": payback_frames, "bank_frames": bank_frames}
    if name == "stream":
        return StreamBudget(keep_ratio, **budget)
    if name == "random":
        return RandomCells(keep_ratio, **budget, seed=seed)
    if name == "frame_topk":
        return FrameTopK(keep_ratio, **budget)
    if name == "difference":
        return FrameDifference(keep_ratio, **budget)
    if name == "keep_all":
        return KeepAll()
    raise ValueError(f"policy must be one of {', '.join(POLICY_NAMES)}, got {name!r}")
