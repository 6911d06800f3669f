"""The endless stream of packed batches, the same for the same seed and resumable to the batch.

The stream is made of lanes, one for each packed row of a training step over all processes. A lane
draws samples for itself, keeps a window of waiting trees and fills its rows from that. So two
processes with one lane each see the same rows as one process with two lanes, and a run can go on
with another number of processes.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError, DataError, RecordTooLong, VideoError
from edge_vlm.prompt import PromptFormat
from edge_vlm_training.data.assemble import CellBudget, assemble
from edge_vlm_training.data.batch import PackedBatch
from edge_vlm_training.data.knapsack import fill_row
from edge_vlm_training.data.mixture import Mixture
from edge_vlm_training.data.sample import Pictures, seed_of
from edge_vlm_training.data.trees import TokenWeights, Tree, TreeBuilder, split_tree

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
    removed: tuple[float, ...] = (0.5,)
    """Shares of cells to remove; every step draws one."""
    min_cells: tuple[int, ...] = (0,)
    """As `removed`: what every later frame keeps."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_frames", "max_branches", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.removed or not all(0 <= share < 1 for share in self.removed):
            raise ValueError(f"removed must be shares in [0, 1), got {list(self.removed)}")
        if not self.min_cells or min(self.min_cells) < 0:
            raise ValueError(f"min_cells must be counts, got {list(self.min_cells)}")


@dataclasses.dataclass(frozen=True)
class _Waiting:
    source: str
    number: int
    part: int
    """Which of the trees that the sample was split into."""
    tree: Tree


class _Lane:
    """Draws of one lane and its window."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.draws = 0
        self.taken: dict[str, int] = {}
        self.window: list[_Waiting] = []
        self.skipped: collections.Counter[str] = collections.Counter()

    def state(self) -> dict[str, Any]:
        window = [[item.source, item.number, item.part] for item in self.window]
        return {
            "draws": self.draws,
            "taken": dict(self.taken),
            "window": window,
            "skipped": dict(self.skipped),
        }


class PackedStream:
    """A `BatchStream` over some lanes of a mixture."""

    def __init__(
        self,
        mixture: Mixture,
        prompt: PromptFormat,
        cfg: ModelConfig,
        packing: PackingConfig,
        *,
        weights: TokenWeights | None = None,
        lanes: Sequence[int] = (0,),
        num_lanes: int = 1,
        rows_per_batch: int | None = None,
        skip_bad: bool = False,
        report: Callable[[str], None] = print,
        threads: int = 0,
    ) -> None:
        """This process's `lanes` of `num_lanes`; a batch takes `rows_per_batch` of them in turn.

        With `skip_bad` a sample that cannot be read or does not fit is left out, reported when
        first met and counted in `skipped`; without, its error stops the stream. `threads` decode at
        a time. Raises ValueError for lanes that are not in 0..num_lanes or that rows_per_batch
        does not divide.
        """
        rows = len(lanes) if rows_per_batch is None else rows_per_batch
        if not lanes or not set(lanes) <= set(range(num_lanes)) or len(set(lanes)) < len(lanes):
            raise ValueError(f"lanes must be different numbers under {num_lanes}, got {lanes}")
        if rows < 1 or len(lanes) % rows:
            raise ValueError(f"rows_per_batch = {rows} must divide {len(lanes)} lanes")
        self.mixture, self.packing, self.cfg = mixture, packing, cfg
        self.skip_bad, self.report, self.threads = skip_bad, report, threads
        self._prompt, self._weights = prompt, weights or TokenWeights()
        self._builder = TreeBuilder(prompt, cfg.attention)
        self._lanes = [_Lane(number) for number in lanes]
        self._num_lanes, self._rows = num_lanes, rows
        self._batches = 0
        self._budgets = [
            CellBudget(cfg=cfg, removed=removed, min_cells=min_cells)
            for removed in packing.removed
            for min_cells in packing.min_cells
        ]

    @property
    def skipped(self) -> dict[str, int]:
        """How often each bad record was left out, by the lanes of this process."""
        return dict(sum((lane.skipped for lane in self._lanes), collections.Counter()))

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> PackedBatch:
        """Raises, unless bad records are skipped, what their reading raises: the state is then
        still that before the batch."""
        before = [(lane.draws, dict(lane.taken), list(lane.window)) for lane in self._lanes]
        try:
            batch = self._next_batch()
        except BaseException:
            for lane, (draws, taken, window) in zip(self._lanes, before, strict=True):
                lane.draws, lane.taken, lane.window = draws, taken, window
            raise
        self._batches += 1
        return batch

    def _next_batch(self) -> PackedBatch:
        per_step = len(self._lanes) // self._rows
        step, part = divmod(self._batches, per_step)
        budget = random.Random(seed_of("step", self.mixture.seed, step)).choice(self._budgets)
        lanes = self._lanes[part * self._rows : (part + 1) * self._rows]
        rows = [self._row(lane, budget) for lane in lanes]
        trees = [[tree for tree, _ in row] for row in rows]
        pictures = [frames for row in rows for _, frames in row]
        return assemble(trees, pictures, self._prompt, self._weights, budget)

    def _row(self, lane: _Lane, budget: CellBudget) -> list[tuple[Tree, Pictures]]:
        """The next row of a lane, with its pictures; never empty."""
        for _ in range(_MOST_BAD_IN_A_ROW):
            while len(lane.window) < self.packing.window:
                lane.window += self._draw(lane)
            chosen = fill_row(
                [item.tree.length(budget.kept(item.tree.num_frames)) for item in lane.window],
                [item.tree.num_frames for item in lane.window],
                self.packing.max_tokens,
                self.packing.max_frames,
            )
            trees = [lane.window[i].tree for i in chosen]
            lane.window = [item for i, item in enumerate(lane.window) if i not in chosen]
            row = [
                (tree, frames) for tree, frames in self._loaded(lane, trees) if frames is not None
            ]
            if row:
                return row
        raise DataError(f"no video of {_MOST_BAD_IN_A_ROW} rows can be read")

    def _loaded(self, lane: _Lane, trees: Sequence[Tree]) -> list[tuple[Tree, Pictures | None]]:
        side = self.cfg.vision.image_size

        def load(tree: Tree) -> Pictures | BadRecord:
            try:
                return tree.load(side)
            except (DataError, VideoError) as error:
                return error

        if self.threads:
            with ThreadPoolExecutor(self.threads) as pool:
                loaded = list(pool.map(load, trees))
        else:
            loaded = [load(tree) for tree in trees]
        found: list[tuple[Tree, Pictures | None]] = []
        for tree, frames in zip(trees, loaded, strict=True):
            if isinstance(frames, (DataError, VideoError)):
                self._bad(lane, frames)
                found.append((tree, None))
            else:
                found.append((tree, frames))
        return found

    def _draw(self, lane: _Lane) -> list[_Waiting]:
        """The next good sample of a lane as trees that fit a row whatever share is removed."""
        for _ in range(_MOST_BAD_IN_A_ROW):
            source = self.mixture.choose(lane.number, lane.draws)
            number = lane.taken.get(source, 0) * self._num_lanes + lane.number
            lane.draws += 1
            lane.taken[source] = lane.taken.get(source, 0) + 1
            try:
                return self._trees(source, number)
            except (DataError, VideoError) as error:
                self._bad(lane, error)
        raise DataError(
            f"{_MOST_BAD_IN_A_ROW} records in a row are bad",
            where=", ".join(self.mixture.names),
            remedy="check the files with `edge-vlm data check`",
        )

    def _trees(self, source: str, number: int) -> list[_Waiting]:
        tree = self._builder.build(self.mixture.sample(source, number))
        parts = split_tree(
            tree,
            kept_cells=max(budget.kept(tree.num_frames) for budget in self._budgets),
            max_tokens=self.packing.max_tokens,
            max_branches=self.packing.max_branches,
        )
        if tree.num_frames > self.packing.max_frames:
            raise RecordTooLong(
                f"a clip of {tree.num_frames} frames, a row has {self.packing.max_frames}",
                where=tree.name,
                remedy="raise max_frames of the packing, or lower that of the sampling",
            )
        return [_Waiting(source, number, i, part) for i, part in enumerate(parts)]

    def _bad(self, lane: _Lane, error: BadRecord) -> None:
        if not self.skip_bad:
            raise error
        name = str(error.where)
        if name not in self.skipped:
            self.report(f"skipped: {error.code}: {error}")
        lane.skipped[name] += 1

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "batches": self._batches,
            "lanes": {str(lane.number): lane.state() for lane in self._lanes},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the states of this stream's lanes; others may be there (`merge_states`)."""
        identity = {key: state.get(key) for key in self._identity()}
        lanes = state.get("lanes", {})
        differing = [key for key, value in self._identity().items() if identity[key] != value]
        missing = [lane.number for lane in self._lanes if str(lane.number) not in lanes]
        if differing or missing or "batches" not in state:
            raise CheckpointError(
                "the data stream's state is of another stream: "
                + ("; ".join(f"{key} differs" for key in differing) or f"no lanes {missing}"),
                remedy="resume with the sources, packing and global batch of the run",
            )
        for lane in self._lanes:
            saved = lanes[str(lane.number)]
            lane.draws, lane.taken = saved["draws"], dict(saved["taken"])
            lane.skipped = collections.Counter(saved["skipped"])
            lane.window = [
                self._trees(source, number)[part] for source, number, part in saved["window"]
            ]
        self._batches = state["batches"]

    def _identity(self) -> dict[str, Any]:
        """What two streams must share to be one."""
        return {
            "seed": self.mixture.seed,
            "sources": list(self.mixture.names),
            "num_lanes": self._num_lanes,
            "packing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.packing).items()
            },
        }


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes of a step as one, from which any of them can go on."""
    lanes = {number: lane for state in states for number, lane in state["lanes"].items()}
    return {**states[0], "lanes": lanes}
