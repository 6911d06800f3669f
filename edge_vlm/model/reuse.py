"""The blocks in front of the drop for changed cells only: the others keep what earlier frames gave
(`edge_vlm.pruning.reuse` decides which have changed).

The vision transformer attends inside one frame. So the patches of changed cells are the queries,
and the keys are those of the whole frame: new ones for the changed cells, kept ones for the others.
No key is computed of what did not change. With all cells changed this is `VideoLM.vit_stem` or
`change_stem`; with fewer it is an approximation, because an unchanged cell does not see that others
changed. `reuse_step` takes one frame of a live stream, `reuse_clips` finished clips at once, with
the same result.

Shape letters: F frames, N patches and C cells per frame, M changed cells, W = 9 patches of a cell,
Q changed patches, R changed cells of all frames, H heads, d head width, D ViT width, P values of a
patch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from edge_vlm.config import CELL, ModelConfig
from edge_vlm.model.layers import attend
from edge_vlm.model.ragged import Layout
from edge_vlm.model.video_lm import VideoLM

WINDOW = CELL * CELL


@dataclasses.dataclass(frozen=True)
class StemState:
    """What is kept of one stream: of each cell, what its last computation gave."""

    hidden_1ND: Tensor
    """Behind the last block in front of the drop."""
    keys: tuple[Tensor, ...]
    """[N, H, d] of each of these blocks."""
    values: tuple[Tensor, ...]
    cells_1CD: Tensor | None = None
    """Pooled for the learned scorer; those of the frame before, where a cell has changed."""
    resting_1C: Tensor | None = None
    """fp32 scores by the learned scorer of cells that do not change."""
    scored_1ND: Tensor | None = None
    """What is scored by change."""


def new_state(cfg: ModelConfig, device: torch.device | str = "cpu") -> StemState:
    """That of a stream of which nothing was computed: its first step must compute every cell.

    Raises ValueError for a model without scores, which drops no cell.
    """
    if not cfg.has_scores:
        raise ValueError("a model without a scorer has no blocks in front of one")
    vision = cfg.vision

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    heads = (vision.num_patches, vision.num_heads, vision.head_dim)
    hidden = zeros(1, vision.num_patches, vision.width)
    keys, values = (tuple(zeros(*heads) for _ in range(cfg.whole_blocks)) for _ in "kv")
    if cfg.change is not None:
        return StemState(hidden, keys, values, scored_1ND=zeros(*hidden.shape))
    cells = zeros(1, vision.num_cells, vision.width)
    return StemState(hidden, keys, values, cells, zeros(1, vision.num_cells))


class _AmongKept(Layout):
    """Changed patches of one frame attend to it whole."""

    def __init__(
        self, patches_Q: Tensor, keys_NHd: Tensor, values_NHd: Tensor, bias_111N: Tensor | None
    ) -> None:
        self.patches_Q, self.bias_111N = patches_Q, bias_111N
        self.keys_NHd, self.values_NHd = keys_NHd, values_NHd
        """With the changed patches' own, once they have attended."""

    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        place = (self.patches_Q,)
        self.keys_NHd = self.keys_NHd.index_put(place, k_PHd)
        self.values_NHd = self.values_NHd.index_put(place, v_PHd)
        keys, values = self.keys_NHd[None], self.values_NHd[None]
        return attend(q_PHd[None], keys, values, self.bias_111N)[0]


def reuse_step(
    model: VideoLM,
    pixels_MWP: Tensor,
    cells_M: Tensor,
    is_first_1: Tensor,
    state: StemState,
) -> tuple[Tensor | None, StemState]:
    """The next frame of a stream, of which `cells` (int64, ascending, one or more) are computed.

    Scores fp32 [1, C] by the learned scorer, or None of a model that is scored by change (`scored`
    of the state is what is), and what is kept from now on.
    """
    vit, scorer, last = model.vit, model.scorer, model.cfg.whole_blocks - 1
    patches_Q = vit.cell_patches_C9[cells_M].flatten()
    x_QD = vit.patch_embed(pixels_MWP.flatten(0, 1)) + vit.pos_embed[patches_Q]
    scores = cells = resting = scored = bias = None
    keys, values = [], []
    for i in range(last + 1):
        if i == last and scorer is not None:
            assert state.cells_1CD is not None and state.resting_1C is not None
            whole = torch.zeros_like(cells_M)
            pooled_1MD = scorer.pool_cells(x_QD.unflatten(0, (1, -1, WINDOW)))
            before = torch.where(
                is_first_1[:, None, None], 0.0, state.cells_1CD[:, cells_M].to(pooled_1MD.dtype)
            )
            both = torch.cat([before, pooled_1MD], 1), torch.cat([pooled_1MD, pooled_1MD], 1)
            rated = scorer(*both)[0]  # one call: its weights are large
            num_changed = cells_M.shape[0]  # len() would fix it when this is exported
            scores = state.resting_1C.index_put((whole, cells_M), rated[:num_changed])
            resting = state.resting_1C.index_put((whole, cells_M), rated[num_changed:])
            cells = state.cells_1CD.index_put((whole, cells_M), pooled_1MD[0])
            bias = vit.spread(scorer.key_bias(scores, is_first_1))[:, None, None]
        elif i == last:
            assert state.scored_1ND is not None
            scored = _put(state.scored_1ND, patches_Q, x_QD)
        among = _AmongKept(patches_Q, state.keys[i], state.values[i], bias)
        x_QD = vit.block(i).forward_ragged(x_QD, among)
        keys.append(among.keys_NHd)
        values.append(among.values_NHd)
    hidden = _put(state.hidden_1ND, patches_Q, x_QD)
    return scores, StemState(hidden, tuple(keys), tuple(values), cells, resting, scored)


def _put(whole_1ND: Tensor, patches_Q: Tensor, rows_QD: Tensor) -> Tensor:
    return whole_1ND[0].index_put((patches_Q,), rows_QD)[None]


@dataclasses.dataclass(frozen=True)
class ReusedClips:
    """As if the frames had come one after the other."""

    hidden_FND: Tensor
    scores_FC: Tensor | None
    """fp32; None of a model that is scored by change."""
    scored_FCWD: Tensor
    """What is scored, one block earlier, by cell. Zeros where that was kept from an earlier call:
    of it a stream with a learned scorer keeps only the pooled cells."""
    state: StemState
    """What is kept of the last frame."""


def reuse_clips(
    model: VideoLM,
    pixels_FNP: Tensor,
    computed_FC: Tensor,
    is_first_F: Tensor,
    state: StemState | None = None,
) -> ReusedClips:
    """Clips that lie end to end, of which the cells `computed` (bool) are computed in each frame.

    Frames with `is_first` (bool) start a clip and must be computed whole; if the first one does
    not, it goes on from `state`. Raises ValueError for anything else. Kept keys and values are
    without gradient: what a frame learns from is its own computation.
    """
    if not bool(computed_FC[is_first_F].all()) or (state is None and not bool(is_first_F[0])):
        raise ValueError("the first frame of a clip must be computed whole")
    vit, scorer, last = model.vit, model.scorer, model.cfg.whole_blocks - 1
    before = new_state(model.cfg, pixels_FNP.device) if state is None else state
    frame_R, cell_R = computed_FC.nonzero(as_tuple=True)
    latest = _Latest(computed_FC, vit.cell_patches_C9)
    patches_Q = vit.cell_patches_C9[cell_R]
    x = vit.patch_embed(pixels_FNP[frame_R[:, None], patches_Q].flatten(0, 1))
    x = x + vit.pos_embed[patches_Q.flatten()]
    scores = None
    kept_cells: tuple[Tensor | None, Tensor | None] = (None, None)
    keys, values = [], []
    for i in range(last + 1):
        if i == last:
            scored = x
            if scorer is not None:
                assert before.cells_1CD is not None
                assert before.resting_1C is not None
                pooled_RD = scorer.pool_cells(x.unflatten(0, (1, -1, WINDOW)))[0]
                cells_D = torch.cat([before.cells_1CD[0].to(pooled_RD.dtype), pooled_RD])
                prev_RD = cells_D[latest.earlier_FC[frame_R, cell_R]]
                prev_RD = prev_RD.masked_fill(is_first_F[frame_R, None], 0.0)
                both = torch.cat([prev_RD, pooled_RD]), torch.cat([pooled_RD, pooled_RD])
                now_R, then_R = scorer(both[0][None], both[1][None])[0].chunk(2)
                resting = torch.cat([before.resting_1C[0], then_R])
                moving = torch.cat([before.resting_1C[0], now_R])
                scores = torch.where(computed_FC, moving[latest.row_FC], resting[latest.row_FC])
                newest = latest.row_FC[-1:]
                kept_cells = cells_D[newest].detach(), resting[newest].detach()
                bias_FC = scorer.key_bias(scores, is_first_F)
                latest.bias_FK = bias_FC.repeat_interleave(WINDOW, 1)
        latest.begin(before.keys[i], before.values[i])
        x = vit.block(i).forward_ragged(x, latest)
        keys.append(latest.keys_NHd)
        values.append(latest.values_NHd)
    by_cell = latest.whole(x, before.hidden_1ND)
    hidden = latest.in_order(by_cell)
    whole_scored = latest.whole(scored, before.scored_1ND)
    kept_scored = None
    if scorer is None:
        kept_scored = latest.in_order(whole_scored[-1:]).detach()
    kept = StemState(
        hidden[-1:].detach(), tuple(keys), tuple(values), *kept_cells, scored_1ND=kept_scored
    )
    return ReusedClips(hidden, scores, whole_scored, kept)


class _Latest(Layout):
    """Changed patches of each frame attend to the latest of every patch up to then. Rows of patches
    lie cell by cell: first those that were kept from before, then the computed ones by frame."""

    def __init__(self, computed_FC: Tensor, cell_patches_C9: Tensor) -> None:
        device, (num_frames, num_cells) = computed_FC.device, computed_FC.shape
        self._patches = cell_patches_C9.flatten()
        number_FC = num_cells - 1 + computed_FC.flatten().cumsum(0).view_as(computed_FC)
        frame_F1 = torch.arange(num_frames, device=device)[:, None]
        since_FC = torch.where(computed_FC, frame_F1, -1).cummax(0).values
        kept_C = torch.arange(num_cells, device=device)
        self.row_FC = torch.where(since_FC < 0, kept_C, number_FC.gather(0, since_FC.clamp(min=0)))
        """Where the latest of each cell is among the kept and the computed ones..."""
        self.earlier_FC = torch.cat([kept_C[None], self.row_FC[:-1]])
        """...and where it was one frame earlier."""
        place_W = torch.arange(WINDOW, device=device)
        self._key_FK = (self.row_FC[..., None] * WINDOW + place_W).flatten(1)
        self._is_own_FK = computed_FC.repeat_interleave(WINDOW, 1)
        counts = [int(count) for count in computed_FC.sum(1)]
        self._groups = sorted((count, n) for count, n in Counter(counts).items() if count)
        """How many cells of how many frames are computed; such frames are laid side by side..."""
        together = sorted((i for i, count in enumerate(counts) if count), key=counts.__getitem__)
        self._frames = torch.tensor(together, dtype=torch.long, device=device)
        """...in this order..."""
        ends = [WINDOW * end for end in accumulate(counts)]
        rows = [torch.arange(ends[i] - WINDOW * counts[i], ends[i]) for i in together]
        self._rows_Q = torch.cat(rows or [torch.arange(0)]).to(device)
        """...and the rows of queries in this."""
        self.bias_FK: Tensor | None = None

    def begin(self, keys_NHd: Tensor, values_NHd: Tensor) -> None:
        """The next block, of which these were kept."""
        self.keys_NHd, self.values_NHd = keys_NHd, values_NHd
        """Those of the last frame, once it has attended."""

    def whole(self, rows_QD: Tensor, kept_1ND: Tensor | None) -> Tensor:
        """The latest of every cell in each frame, [F, C, W, D]; zeros where nothing is known."""
        num_kept = len(self._patches)
        if kept_1ND is None:
            kept = rows_QD.new_zeros(num_kept, rows_QD.shape[-1])
        else:
            kept = kept_1ND[0, self._patches].to(rows_QD.dtype)
        latest: Tensor = torch.cat([kept, rows_QD]).unflatten(0, (-1, WINDOW))[self.row_FC]
        return latest

    def in_order(self, by_cell_FCWD: Tensor) -> Tensor:
        """Patches as they lie in the picture, [F, N, D]."""
        return by_cell_FCWD.flatten(1, 2)[:, self._patches.argsort()]

    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        index_FK = self._key_FK
        kept = (self.keys_NHd, self.values_NHd)
        k, v = (
            torch.cat([x[self._patches].to(new.dtype), new])
            for x, new in zip(kept, (k_PHd, v_PHd), strict=True)
        )
        order = self._patches.argsort()
        self.keys_NHd, self.values_NHd = (x.detach()[index_FK[-1]][order] for x in (k, v))
        if torch.is_grad_enabled():
            index_FK = index_FK + self._is_own_FK * len(k)
            k, v = (torch.cat([x.detach(), x]) for x in (k, v))
        parts = []
        numbers = [n for _, n in self._groups]
        groups = (
            q_PHd[self._rows_Q].split([WINDOW * count * n for count, n in self._groups]),
            _read(k, index_FK[self._frames], numbers),
            _read(v, index_FK[self._frames], numbers),
            self._frames.split(numbers),
        )
        for queries, keys, values, frames in zip(*groups, strict=True):
            bias = None if self.bias_FK is None else self.bias_FK[frames, None, None]
            seen = attend(queries.unflatten(0, (len(frames), -1)), keys, values, bias)
            parts.append(seen.flatten(0, 1).to(q_PHd.dtype))
        if not parts:
            return q_PHd
        return torch.empty_like(q_PHd).index_copy(0, self._rows_Q, torch.cat(parts))


def _read(x_PHd: Tensor, index_FK: Tensor, numbers: list[int]) -> Iterable[Tensor]:
    """Rows of so many frames each. The gradient of a read is as large as what is read from, so
    where there is one all are read at once."""
    if torch.is_grad_enabled():
        groups: tuple[Tensor, ...] = x_PHd[index_FK].split(numbers)
        return groups
    return (x_PHd[index] for index in index_FK.split(numbers))
