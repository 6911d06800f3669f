"""A picture in, the features of its kept cells out.

Runs `vit_stem` on the whole picture, lets a policy choose by the scores, and runs `vit_trunk` on
the survivors only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edge_vlm.config import ModelConfig
from edge_vlm.errors import ConfigError, NonFinite
from edge_vlm.pixels.frames import Frame
from edge_vlm.pixels.patches import resize_bilinear, to_pixel_values
from edge_vlm.pruning.change import LastKept
from edge_vlm.pruning.policies import KeepAll, KeepPolicy
from edge_vlm.pruning.reuse import ReuseRule
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.inference.stem_reuse import KeptStem, StemReuse, StemRun


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameTokens:
    """What is left of one frame. Kept on the host, so that it can be prefilled again later."""

    embeds: np.ndarray
    """Features f32 [K, width]; added to the patch token's embedding."""
    cells: np.ndarray
    """Kept cells i32 [K], ascending."""
    scores: np.ndarray
    """Scores f32 [num_cells] of all cells."""
    pts_ns: int
    seq: int
    stage_ms: dict[str, float]
    """Milliseconds spent in `preprocess`, `vit_stem`, `select` and `vit_trunk`."""
    received_ns: int = 0
    """Arrival of the frame on the server's clock, where one keeps it."""
    picture: np.ndarray | None = None
    """Of a frame that is encoded only when somebody looks at it: u8 [S, S, 3] in the size that the
    model sees. `embeds` is empty then."""
    share_computed: float = 1.0
    """Share of the cells that the blocks in front of the drop were computed for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameStem:
    """A frame whose cells are scored and not chosen yet."""

    hidden: np.ndarray
    """f32 [1, num_patches, width]"""
    scores: np.ndarray
    """f32 [num_cells]"""
    pts_ns: int
    seq: int
    stage_ms: dict[str, float]
    received_ns: int = 0
    share_computed: float = 1.0
    """As that of `FrameTokens`."""


class VisionState:
    """What one stream's next frame needs of the last one. Never share it between streams."""

    def __init__(self, num_cells: int, width: int) -> None:
        self.is_first = True
        # Two buffers that change places: the graph reads one and writes the other.
        self.prev_cells = np.zeros((1, num_cells, width), np.float32)
        self.next_cells = np.zeros_like(self.prev_cells)

        self.last_kept = LastKept(num_cells)
        """For a model whose scores are of change."""
        self.kept: KeptStem | None = None
        """With reuse: what the next frame need not compute."""

    def forget_kept(self) -> None:
        """The next frame is computed whole."""
        if self.kept is not None:
            self.kept.cells.forget()

    def advance(self, cells: np.ndarray) -> None:
        """`cells`: what was kept of the frame."""
        self.prev_cells, self.next_cells = self.next_cells, self.prev_cells
        self.last_kept.keep(cells)
        self.is_first = False


class VisionPipeline:
    """Stateless but for scratch memory; the stream's state is an argument. One thread."""

    def __init__(
        self, stem: Engine, trunk: Engine, cfg: ModelConfig, reuse: StemReuse | None = None
    ) -> None:
        self._stem, self._trunk, self._cfg, self._reuse = stem, trunk, cfg, reuse
        vision = cfg.vision
        self.num_cells = vision.num_cells
        self._is_first = np.zeros(1, np.bool_)
        self._hidden = np.empty((1, vision.num_patches, vision.width), np.float32)
        self._frame_id = np.zeros(vision.num_cells, np.int32)
        self._has_scorer = cfg.scorer is not None
        self.is_memoryless = not self._has_scorer and cfg.change is None
        """What becomes of a frame does not depend on those before it, unless a policy makes it."""
        if self._has_scorer:
            stem.bind_array("is_first", self._is_first)
        self._own_scored = np.empty_like(self._hidden)
        self._scored = self._own_scored
        if cfg.change is not None:
            stem.bind_array("scored", self._own_scored)
        stem.bind_array("hidden", self._hidden)

    @property
    def scored(self) -> npt.NDArray[np.float32]:
        """[N, D] of the frame that was looked at last: what its change is scored by, where the
        model has that scorer. Overwritten by the next frame."""
        scored: npt.NDArray[np.float32] = self._scored[0]
        return scored

    def new_state(self) -> VisionState:
        return VisionState(self.num_cells, self._cfg.vision.width)

    def set_reuse(self, state: VisionState, rule: ReuseRule | None) -> None:
        """From the stream's next frame on: by this rule, or None: every cell is computed. Raises
        ConfigError where the bundle has no graph for it."""
        if rule is None:
            state.kept = None
        elif self._reuse is None:
            raise ConfigError(
                "reuse needs a graph that the bundle has not",
                where="session settings",
                remedy="set reuse to 0, or export the weights again with --reuse",
            )
        elif state.kept is None:
            state.kept = self._reuse.new(rule)
        else:
            state.kept.cells.rule = rule

    def encode(self, frame: Frame, state: VisionState, policy: KeepPolicy) -> FrameTokens:
        """Encodes the next frame of a stream.

        `state` moves on only when all went well; otherwise the next frame is computed whole. Raises
        NonFinite when a graph gave NaN or infinity, ValueError when the policy chose cells that do
        not exist or are not ascending.
        """
        try:
            return self._encode(frame, state, policy)
        except BaseException:
            state.forget_kept()
            raise

    def _encode(self, frame: Frame, state: VisionState, policy: KeepPolicy) -> FrameTokens:
        begin = time.perf_counter()
        pixels = to_pixel_values(frame.rgb, self._cfg.vision)
        ready = time.perf_counter()
        run = self._run_stem(pixels, frame, state)
        scored = time.perf_counter()
        cells = self._checked(policy.select(run.scores, frame.rgb, state.is_first))
        chosen = time.perf_counter()
        embeds = self._features(run.hidden, cells)
        end = time.perf_counter()
        self._advance(state, cells)
        return FrameTokens(
            embeds=embeds,
            cells=cells,
            scores=run.scores,
            share_computed=run.share_computed,
            pts_ns=frame.pts_ns,
            seq=frame.seq,
            stage_ms={
                "preprocess": (ready - begin) * 1e3,
                "vit_stem": (scored - ready) * 1e3,
                "select": (chosen - scored) * 1e3,
                "vit_trunk": (end - chosen) * 1e3,
            },
        )

    def look(self, frame: Frame, state: VisionState) -> FrameStem:
        """The part of `encode` before the choice, of a clip whose cells are chosen when all of it
        is there. Change is against the frame before. Raises NonFinite."""
        begin = time.perf_counter()
        pixels = to_pixel_values(frame.rgb, self._cfg.vision)
        ready = time.perf_counter()
        try:
            run = self._run_stem(pixels, frame, state)
        except BaseException:
            state.forget_kept()
            raise
        self._advance(state, np.arange(self.num_cells, dtype=np.int32))
        return FrameStem(
            hidden=run.hidden.copy(),
            scores=run.scores,
            share_computed=run.share_computed,
            pts_ns=frame.pts_ns,
            seq=frame.seq,
            stage_ms={
                "preprocess": (ready - begin) * 1e3,
                "vit_stem": (time.perf_counter() - ready) * 1e3,
            },
        )

    def finish(self, stem: FrameStem, kept: np.ndarray, context: np.ndarray) -> FrameTokens:
        """The part after it. `kept` and `context` are bool [num_cells]: what stays of the frame,
        and what the blocks behind the drop see of it. Raises NonFinite."""
        begin = time.perf_counter()
        embeds = self._features(stem.hidden, np.flatnonzero(context).astype(np.int32))
        trunk_ms = (time.perf_counter() - begin) * 1e3
        return FrameTokens(
            embeds=embeds[kept[context]],
            cells=np.flatnonzero(kept).astype(np.int32),
            scores=stem.scores,
            share_computed=stem.share_computed,
            pts_ns=stem.pts_ns,
            seq=stem.seq,
            stage_ms={**stem.stage_ms, "vit_trunk": trunk_ms},
            received_ns=stem.received_ns,
        )

    def postpone(self, frame: Frame) -> FrameTokens:
        """A frame that keeps every cell, to be encoded by `encode_postponed` if it is ever needed.

        Only where the pipeline `is_memoryless`."""
        begin = time.perf_counter()
        picture = resize_bilinear(frame.rgb, self._cfg.vision.image_size).astype(np.uint8)
        return FrameTokens(
            embeds=np.empty((0, self._cfg.language.width), np.float32),
            cells=np.arange(self.num_cells, dtype=np.int32),
            scores=np.ones(self.num_cells, np.float32),
            pts_ns=frame.pts_ns,
            seq=frame.seq,
            stage_ms={"preprocess": (time.perf_counter() - begin) * 1e3},
            picture=picture,
        )

    def encode_postponed(self, tokens: FrameTokens) -> FrameTokens:
        """The same frame, encoded: as `encode` would have had it at once. Raises as that."""
        assert tokens.picture is not None
        frame = Frame(rgb=tokens.picture, pts_ns=tokens.pts_ns, seq=tokens.seq)
        encoded = self.encode(frame, self.new_state(), KeepAll())
        return replace(encoded, received_ns=tokens.received_ns)

    def _advance(self, state: VisionState, cells: np.ndarray) -> None:
        state.advance(cells)
        if state.kept is not None and self._reuse is not None:
            self._reuse.keep(state.kept)

    def _run_stem(self, pixels: np.ndarray, frame: Frame, state: VisionState) -> StemRun:
        """Hidden states and scores; fills the state's next cells. Without a scorer all scores
        are 1."""
        if state.kept is None or self._reuse is None:
            run = self._run_whole(pixels, state)
        else:
            height, width = frame.rgb.shape[:2]
            run = self._reuse.run(
                *(state.kept, pixels, (height, width)),
                *(state.prev_cells, state.next_cells, state.is_first),
            )
        if run.scored is not None:
            self._scored = run.scored
            changes = state.last_kept.scores(run.scored[0])
            if not np.isfinite(changes).all():
                raise NonFinite("what a frame is scored by is not finite", where="vit_stem")
            return replace(run, scores=changes)
        if not np.isfinite(run.scores).all():
            raise NonFinite("the token scores of a frame are not finite", where="vit_stem")
        return run

    def _run_whole(self, pixels: np.ndarray, state: VisionState) -> StemRun:
        stem = self._stem
        if not self._has_scorer:
            stem.bind_array("pixels", pixels[None])
            stem.run()
            scored = None if self._cfg.change is None else self._own_scored
            return StemRun(self._hidden, np.ones(self.num_cells, np.float32), scored)
        scores = np.empty((1, self.num_cells), np.float32)
        self._is_first[0] = state.is_first
        stem.bind_array("pixels", pixels[None])
        stem.bind_array("prev_cells", state.prev_cells)
        stem.bind_array("cells", state.next_cells)
        stem.bind_array("scores", scores)
        stem.run()
        return StemRun(self._hidden, scores[0], None)

    def _checked(self, cells: np.ndarray) -> np.ndarray:
        cells = np.ascontiguousarray(cells, np.int32)
        rising = cells.ndim == 1 and bool((np.diff(cells) > 0).all())
        if not rising or (len(cells) and not 0 <= cells[0] <= cells[-1] < self.num_cells):
            raise ValueError(f"kept cells must rise within 0..{self.num_cells - 1}, got {cells}")
        return cells

    def _features(self, hidden: np.ndarray, cells: np.ndarray) -> np.ndarray:
        embeds = np.empty((len(cells), self._cfg.language.width), np.float32)
        if len(cells) == 0:
            return embeds
        trunk = self._trunk
        trunk.bind_array("hidden", hidden)
        trunk.bind_array("cell_idx", cells)
        trunk.bind_array("frame_id", self._frame_id[: len(cells)])
        trunk.bind_array("features", embeds)
        trunk.run()
        if not np.isfinite(embeds).all():
            raise NonFinite("the features of a frame are not finite", where="vit_trunk")
        return embeds
