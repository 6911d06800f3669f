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
from typing import Any

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import PackedBatch
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.row_stream import BadRecord, Lane, PackingConfig, Supply
from edge_vlm_training.data.packing.trees import TokenWeights, TreeBuilder
from edge_vlm_training.data.sample import draw_reuse, seed_of
from edge_vlm_training.data.sources.mixture import Mixture
from edge_vlm_training.recipes.base import Form


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
        form: Form = "rows",
        reuse: Sequence[float] = (0.0,),
    ) -> None:
        """This process's `lanes` of `num_lanes`; a batch takes `rows_per_batch` of them in turn.

        With `skip_bad` a sample that cannot be read or does not fit is left out, reported when
        first met and counted in `skipped`; without, its error stops the stream. `threads` open and
        decode files. Raises ValueError for lanes that are not in 0..num_lanes or that
        rows_per_batch does not divide.
        """
        rows = len(lanes) if rows_per_batch is None else rows_per_batch
        if not lanes or not set(lanes) <= set(range(num_lanes)) or len(set(lanes)) < len(lanes):
            raise ValueError(f"lanes must be different numbers under {num_lanes}, got {lanes}")
        if rows < 1 or len(lanes) % rows:
            raise ValueError(f"rows_per_batch = {rows} must divide {len(lanes)} lanes")
        self._seed, self._prompt = mixture.seed, prompt
        self._weights = weights or TokenWeights()
        self._skip_bad, self._report, self._form = skip_bad, report, form
        self._reuse = reuse
        self._budgets = [
            CellBudget(cfg=cfg, keep_ratio=keep_ratio, min_cells=min_cells)
            for keep_ratio in packing.keep_ratio
            for min_cells in packing.min_cells
        ]
        self._supply = Supply(
            mixture=mixture,
            builder=TreeBuilder(prompt, cfg.attention),
            packing=packing,
            budgets=self._budgets,
            num_lanes=num_lanes,
            side=cfg.vision.image_size,
            threads=threads,
            on_bad=self._on_bad,
        )
        self._lanes = [Lane(number, self._supply) for number in lanes]
        self._rows = rows
        self._batches = 0

    @property
    def skipped(self) -> dict[str, int]:
        """How often each bad record was left out, by the lanes of this process."""
        return dict(sum((lane.skipped for lane in self._lanes), collections.Counter()))

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> PackedBatch:
        """Raises, unless bad records are skipped, what their reading raises.

        After an error load a state before going on: rows may be lost otherwise.
        """
        per_step = len(self._lanes) // self._rows
        step, part = divmod(self._batches, per_step)
        budget = random.Random(seed_of("step", self._seed, step)).choice(self._budgets)
        lanes = self._lanes[part * self._rows : (part + 1) * self._rows]
        rows = [lane.row(budget) for lane in lanes]
        self._batches += 1
        clips = sum(map(len, rows))
        return assemble(
            [[tree for tree, _ in row] for row in rows],
            [pictures for row in rows for _, pictures in row],
            self._prompt,
            self._weights,
            budget,
            form=self._form,
            reuse=draw_reuse(self._reuse, clips, self._seed, self._batches),
        )

    def _on_bad(self, error: BadRecord) -> None:
        if not self._skip_bad:
            raise error
        if str(error.where) not in self.skipped:
            self._report(f"skipped: {error.code}: {error}")

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "batches": self._batches,
            "lanes": {str(lane.number): lane.state() for lane in self._lanes},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the states of this stream's lanes; others may be there (`merge_states`)."""
        lanes = state.get("lanes", {})
        differing = [key for key, value in self._identity().items() if state.get(key) != value]
        missing = [lane.number for lane in self._lanes if str(lane.number) not in lanes]
        if differing or missing or "batches" not in state:
            raise CheckpointError(
                "the data stream's state is of another stream: "
                + ("; ".join(f"{key} differs" for key in differing) or f"no lanes {missing}"),
                remedy="resume with the sources, packing and global batch of the run",
            )
        for lane in self._lanes:
            lane.load(lanes[str(lane.number)])
        self._batches = state["batches"]

    def _identity(self) -> dict[str, Any]:
        """What two streams must share to be one."""
        packing = dataclasses.asdict(self._supply.packing)
        return {
            "seed": self._seed,
            "sources": list(self._supply.mixture.names),
            "num_lanes": self._supply.num_lanes,
            "packing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in packing.items()
            },
        }


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes of a step as one, from which any of them can go on."""
    lanes = {number: lane for state in states for number, lane in state.get("lanes", {}).items()}
    return {**states[0], "lanes": lanes}
