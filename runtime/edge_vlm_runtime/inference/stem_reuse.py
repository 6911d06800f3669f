"""The graph of changed cells, and what each stream keeps for it.

A stream's memory and one more of the same size change places with each frame: the graph reads one
and writes the other, so a frame that fails leaves what was kept as it was.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.pixels.patches import cell_table
from edge_vlm.pruning.reuse import CellsComputed, ReuseRule
from edge_vlm_runtime.engines.base import CacheMemory, Engine

OF_A_BLOCK = "kept_"
"""Begin of the names of keys and values, which no other graph reads."""


def _written_as(name: str) -> str:
    """The output that becomes this input of the next frame's run."""
    return name.removeprefix("prev_") if name.startswith("prev_") else name.replace("kept", "next")


def _states(spec: GraphSpec) -> list[str]:
    """Inputs that are kept from frame to frame; pooled cells are the whole stem's too."""
    names = [tensor.name for tensor in spec.inputs]
    return [n for n in names if n.startswith((OF_A_BLOCK, "prev_")) and n != "prev_cells"]


class _Memory:
    """One set of states: keys and values in the engines' memory, the rest on the host."""

    def __init__(self, spec: GraphSpec, memory: CacheMemory | None) -> None:
        self.arrays: dict[str, npt.NDArray[np.float32]] = {}
        """Keys and values may be float16."""
        self.pointers: dict[str, tuple[int, tuple[int, ...]]] = {}
        for tensor in spec.inputs:
            if tensor.name not in _states(spec):
                continue
            shape, dtype = tensor.resolve({}), np.dtype(tensor.dtype)
            if memory is None or not tensor.name.startswith(OF_A_BLOCK):
                self.arrays[tensor.name] = np.zeros(shape, dtype)
            else:
                start = memory.alloc(math.prod(shape) * dtype.itemsize)
                weakref.finalize(self, memory.free, start).atexit = False
                self.pointers[tensor.name] = start, shape

    def bind(self, engine: Engine, *, as_outputs: bool) -> None:
        for name, array in self.arrays.items():
            engine.bind_array(_written_as(name) if as_outputs else name, array)
        for name, (start, shape) in self.pointers.items():
            engine.bind(_written_as(name) if as_outputs else name, start, shape)


class KeptStem:
    """What one stream keeps of its last frame, and of which pixels. Never share it."""

    def __init__(self, num_cells: int, rule: ReuseRule, memory: _Memory) -> None:
        self.cells = CellsComputed(num_cells, rule)
        self.memory = memory
        self.frame: tuple[npt.NDArray[np.float32], tuple[int, int], npt.NDArray[np.int32]] | None
        self.frame = None
        """Pixels, size and computed cells of a frame whose states are not kept yet."""


@dataclass(frozen=True, eq=False)
class StemRun:
    """What the blocks in front of the drop gave of a frame. Its arrays are good until the next."""

    hidden: npt.NDArray[np.float32]
    """[1, N, D]"""
    scores: npt.NDArray[np.float32]
    """[C] by a learned scorer."""
    scored: npt.NDArray[np.float32] | None
    """[1, N, D]: what change is seen by, of a model that is scored by it."""
    share_computed: float = 1.0
    """Share of the cells that were computed for it."""


class StemReuse:
    """One owner, one thread. Streams are arguments."""

    def __init__(self, engine: Engine, num_cells: int, memory: CacheMemory | None) -> None:
        self._engine, self._num_cells, self._device = engine, num_cells, memory
        self._table = cell_table(math.isqrt(num_cells))
        self._is_scored = "prev_resting" in _states(engine.spec)
        """By a learned scorer."""
        self._other: _Memory | None = None
        """The next states; those of a stream when they are kept. Made with the first stream."""
        self._is_first = np.zeros(1, np.bool_)
        self._scores = np.empty((1, num_cells), np.float32)

    def new(self, rule: ReuseRule) -> KeptStem:
        if self._other is None:
            self._other = _Memory(self._engine.spec, self._device)
        return KeptStem(self._num_cells, rule, _Memory(self._engine.spec, self._device))

    def run(
        self,
        kept: KeptStem,
        pixels_NP: npt.NDArray[np.float32],
        size: tuple[int, int],
        prev_cells: npt.NDArray[np.float32],
        next_cells: npt.NDArray[np.float32],
        is_first: bool,
    ) -> StemRun:
        """The stem of a stream's next frame, of the cells that changed; where none did, no graph is
        run. `size`: height and width of the picture as it came. `prev_cells` are read and
        `next_cells` written where a scorer is learned.

        Call `keep` afterwards, or `kept.cells.forget` if the frame fails.
        """
        cells = kept.cells.next(pixels_NP, size)
        kept.frame = (pixels_NP, size, cells)
        assert self._other is not None  # there is a stream
        engine, now = self._engine, self._other if len(cells) else kept.memory
        if len(cells):
            engine.bind_array("pixels", pixels_NP[self._table[cells]])
            engine.bind_array("cell_idx", cells)
            if self._is_scored:
                self._is_first[0] = is_first
                engine.bind_array("is_first", self._is_first)
                engine.bind_array("prev_cells", prev_cells)
                engine.bind_array("cells", next_cells)
                engine.bind_array("scores", self._scores)
            kept.memory.bind(engine, as_outputs=False)
            now.bind(engine, as_outputs=True)
            engine.run()
        elif self._is_scored:
            np.copyto(next_cells, prev_cells)
            np.copyto(self._scores, now.arrays["prev_resting"])
        return StemRun(
            hidden=now.arrays["prev_hidden"],
            scores=self._scores[0].copy(),
            scored=now.arrays.get("prev_scored"),
            share_computed=len(cells) / self._num_cells,
        )

    def keep(self, kept: KeptStem) -> None:
        """The frame that was run last went well."""
        assert kept.frame is not None
        _, _, cells = kept.frame
        if len(cells) and self._other is not None:
            kept.memory, self._other = self._other, kept.memory
        kept.cells.computed(*kept.frame)
        kept.frame = None
