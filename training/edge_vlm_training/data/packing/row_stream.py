"""One lane of the stream: what it has drawn, the window it chooses from, the rows it gives."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edge_vlm.errors import DataError, RecordTooLong, VideoError
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.knapsack import fill_row
from edge_vlm_training.data.packing.trees import Tree, TreeBuilder, split_tree
from edge_vlm_training.data.sample import Pictures
from edge_vlm_training.data.sources.mixture import Mixture

BadRecord = DataError | VideoError
_MOST_BAD_IN_A_ROW = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Published STTS: 9,686 tokens a row, clips of 64 frames; Molmo2: 16,384 and 128."""

    max_tokens: int = 9_686
    max_frames: int = 128
    max_branches: int = 32
    """Of a clip in a row; more make the clip come again with the rest of them."""
    window: int = 48
    """Trees that a lane chooses from."""
    keep_ratio: tuple[float, ...] = (0.5,)
    """Shares of cells to keep; every step draws one."""
    min_cells: tuple[int, ...] = (0,)
    """As `keep_ratio`: what every later frame keeps."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_frames", "max_branches", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.keep_ratio or not all(0 < share <= 1 for share in self.keep_ratio):
            raise ValueError(f"keep_ratio must be shares in (0, 1], got {list(self.keep_ratio)}")
        if not self.min_cells or min(self.min_cells) < 0:
            raise ValueError(f"min_cells must be counts, got {list(self.min_cells)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supply:
    """What all lanes of a process draw from."""

    mixture: Mixture
    builder: TreeBuilder
    packing: PackingConfig
    budgets: Sequence[CellBudget]
    num_lanes: int
    side: int
    """Of the model's pictures, in pixels."""
    threads: int
    """That open and decode files; 0: the caller's own."""
    on_bad: Callable[[BadRecord], None]
    """Raises, or lets the record be left out."""

    def trees(self, source: str, number: int) -> list[Tree]:
        """A sample as trees that fit a row whatever share is kept.

        Raises VideoError and DataError.
        """
        tree = self.builder.build(self.mixture.sample(source, number))
        if tree.num_frames > self.packing.max_frames:
            raise RecordTooLong(
                f"a clip of {tree.num_frames} frames, a row has {self.packing.max_frames}",
                where=tree.name,
                remedy="raise max_frames of the packing, or lower that of the sampling",
            )
        parts = split_tree(
            tree,
            kept_cells=max(budget.kept(tree.num_frames) for budget in self.budgets),
            max_tokens=self.packing.max_tokens,
            max_branches=self.packing.max_branches,
        )
        return list(parts)

    def open(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Opens samples at the same time; sources remember what they have found out."""

        def look(item: tuple[str, int]) -> None:
            # What is wrong with it is said when it is drawn.
            with contextlib.suppress(DataError, VideoError):
                self.mixture.sample(*item)

        if self.threads and len(wanted) > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(look, wanted))

    def pictures(self, trees: Sequence[Tree]) -> list[Pictures | BadRecord]:
        """What each tree shows, or why that cannot be had."""

        def load(tree: Tree) -> Pictures | BadRecord:
            try:
                return tree.load(self.side)
            except (DataError, VideoError) as error:
                return error

        if not self.threads:
            return [load(tree) for tree in trees]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(load, trees))


@dataclasses.dataclass(frozen=True)
class _Waiting:
    source: str
    number: int
    part: int
    """Which of the trees that the sample was split into."""
    tree: Tree


class Lane:
    """Rows of one lane. Its state is small: sources give the same sample for the same number."""

    def __init__(self, number: int, supply: Supply) -> None:
        self.number = number
        self.skipped: collections.Counter[str] = collections.Counter()
        self._supply = supply
        self._draws = 0
        self._taken: collections.Counter[str] = collections.Counter()
        self._window: list[_Waiting] = []

    def row(self, budget: CellBudget) -> list[tuple[Tree, Pictures]]:
        """The next row with its pictures; never empty.

        Raises what `on_bad` raises, and DataError if there is nothing but bad records.
        """
        packing = self._supply.packing
        for _ in range(_MOST_BAD_IN_A_ROW):
            self._fill()
            chosen = fill_row(
                [item.tree.length(budget.kept(item.tree.num_frames)) for item in self._window],
                [item.tree.num_frames for item in self._window],
                packing.max_tokens,
                packing.max_frames,
            )
            trees = [self._window[i].tree for i in chosen]
            self._window = [item for i, item in enumerate(self._window) if i not in chosen]
            row = []
            for tree, pictures in zip(trees, self._supply.pictures(trees), strict=True):
                if isinstance(pictures, (DataError, VideoError)):
                    self._bad(pictures)
                else:
                    row.append((tree, pictures))
            if row:
                return row
        raise DataError(f"no video of {_MOST_BAD_IN_A_ROW} rows can be read")

    def _fill(self) -> None:
        window, size = self._window, self._supply.packing.window
        taken = self._taken.copy()
        coming = range(self._draws, self._draws + size - len(window))
        self._supply.open([self._drawn(draw, taken) for draw in coming])
        while len(window) < size:
            window += self._draw()

    def _drawn(self, draw: int, taken: collections.Counter[str]) -> tuple[str, int]:
        """Source and number of a draw; `taken` counts it."""
        source = self._supply.mixture.choose(self.number, draw)
        number = taken[source] * self._supply.num_lanes + self.number
        taken[source] += 1
        return source, number

    def _draw(self) -> list[_Waiting]:
        """The trees of the next good sample."""
        for _ in range(_MOST_BAD_IN_A_ROW):
            source, number = self._drawn(self._draws, self._taken)
            self._draws += 1
            try:
                trees = self._supply.trees(source, number)
            except (DataError, VideoError) as error:
                self._bad(error)
            else:
                return [_Waiting(source, number, i, tree) for i, tree in enumerate(trees)]
        raise DataError(
            f"{_MOST_BAD_IN_A_ROW} records in a row are bad",
            where=", ".join(self._supply.mixture.names),
            remedy="check the files with `edge-vlm data check`",
        )

    def _bad(self, error: BadRecord) -> None:
        self._supply.on_bad(error)
        self.skipped[str(error.where)] += 1

    def state(self) -> dict[str, Any]:
        return {
            "draws": self._draws,
            "taken": dict(self._taken),
            "window": [[item.source, item.number, item.part] for item in self._window],
            "skipped": dict(self.skipped),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises what the waiting samples raise."""
        waiting = [(source, number, part) for source, number, part in state["window"]]
        self._supply.open([(source, number) for source, number, _ in waiting])
        self._window = [
            _Waiting(source, number, part, self._supply.trees(source, number)[part])
            for source, number, part in waiting
        ]
        self._draws = state["draws"]
        self._taken = collections.Counter(state["taken"])
        self.skipped = collections.Counter(state["skipped"])
