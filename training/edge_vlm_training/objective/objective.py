"""The loss of STTS training on a packed batch: sums that add up over batches and processes.

Shape letters: R rows, S tokens of a row, G kept cells, E language width, A trained tokens, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.model.llm import rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.data.batch import IGNORED, PADDING, PackedBatch, PackedTokens
from edge_vlm_training.data.masks import additive_mask
from edge_vlm_training.objective.losses import answer_sums
from edge_vlm_training.objective.step import to_pixel_values
from edge_vlm_training.objective.vision import SeenClips, aux_count, see_clips


@dataclasses.dataclass(frozen=True)
class Totals:
    """What the sums of an update are divided by, over all its batches and processes."""

    weight: Tensor
    """Sum of the token weights, f32 scalar."""
    aux_cells: Tensor
    """Cells of the similarity loss, f32 scalar."""


def totals_of(batches: list[PackedBatch], num_cells: int) -> Tensor:
    """This process's part of `Totals`, f32 [2]: known before anything is computed."""
    weight = sum((batch.tokens.weight_RS.sum() for batch in batches), torch.zeros(()))
    cells = sum(aux_count(batch.frames_per_clip, num_cells) for batch in batches)
    return torch.stack([weight.float().cpu(), torch.tensor(float(cells))])


@dataclasses.dataclass(frozen=True)
class BatchSums:
    """What a batch adds to an update. `loss` carries the gradient, the rest is for the report."""

    loss: Tensor
    sums: Tensor
    """f32 [len(SUMS)], detached."""
    kept_F: Tensor
    """int64: cells kept of each frame."""
    row_tokens_R: Tensor
    """int64: tokens of each row behind the drop."""


_ALIGNMENT = 8
SUMS = ("answer", "z", "aux", "right", "trained", "kept", "cells", "tokens")


class Objective(nn.Module):
    """The model and its loss; the module that is sharded, so that every use goes through it."""

    METHODS = ("see", "hidden_states", "logits")
    """Entry points besides `forward`."""

    def __init__(
        self,
        model: VideoLM,
        *,
        z_loss: float,
        aux_weight: float,
        residual_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
    ) -> None:
        """`dtype` is that of the products: by autocast, or because the weights are in it."""
        super().__init__()
        self.model = model
        self.z_loss, self.aux_weight = z_loss, aux_weight
        self.dtype, self.autocast = dtype, autocast and dtype is not torch.float32
        if residual_dropout:
            _drop_from_residuals(model, residual_dropout)

    def forward(self, batch: PackedBatch, totals: Totals, world_size: int = 1) -> BatchSums:
        """The loss is this batch's share of the whole update's, times `world_size`, because the
        gradients of processes are averaged."""
        with self._precision():
            seen = self._see(batch)
            tokens = _aligned(batch.pruned(seen.kept_FC))
            hidden = self._hidden(tokens, seen.features_GE)
            trained = (tokens.target_RS != IGNORED).flatten()
            logits = self.model.llm.head(hidden.flatten(0, 1)[trained])
        target, weight = tokens.target_RS.flatten()[trained], tokens.weight_RS.flatten()[trained]
        answer, squares, right = answer_sums(logits, target, weight)
        loss = (answer + self.z_loss * squares) / totals.weight
        if seen.aux_sum.requires_grad:
            loss = loss + self.aux_weight * seen.aux_sum / totals.aux_cells.clamp(min=1)
        kept_F = seen.kept_FC.sum(1)
        numbers = (
            *(answer, squares, seen.aux_sum, right, trained.sum()),
            *(kept_F.sum(), torch.tensor(seen.kept_FC.numel()), tokens.lengths_R.sum()),
        )
        sums = torch.stack([x.detach().float().to(loss.device) for x in numbers])
        return BatchSums(loss * world_size, sums, kept_F, tokens.lengths_R)

    def see(self, batch: PackedBatch) -> SeenClips:
        """Prunes and encodes the clips of a batch."""
        with self._precision():
            return self._see(batch)

    def hidden_states(self, tokens: PackedTokens, features_GE: Tensor) -> Tensor:
        """[R, S, D] behind the last norm; `features` are those of the patch tokens in order."""
        with self._precision():
            return self._hidden(tokens, features_GE)

    def logits(self, hidden_AD: Tensor) -> Tensor:
        """[A, V]"""
        with self._precision():
            return self.model.llm.head(hidden_AD)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        device = self.model.llm.norm.weight.device.type
        return torch.autocast(device, self.dtype, enabled=self.autocast)

    def _see(self, batch: PackedBatch) -> SeenClips:
        pixels = to_pixel_values(batch.frames_FSS3, self.model.cfg.vision, self.dtype)
        return see_clips(
            self.model,
            pixels,
            batch.frames_per_clip,
            batch.removed,
            batch.min_cells,
            self.dtype,
        )

    def _hidden(self, tokens: PackedTokens, features_GE: Tensor) -> Tensor:
        llm = self.model.llm
        embeds = llm.embed(tokens.ids_RS)
        flat = embeds.flatten(0, 1)
        flat = flat.index_add(0, tokens.patch_places(), features_GE.to(flat.dtype))
        cos, sin = rope_tables(llm.cfg, tokens.positions_RS)
        tables = [(cos, sin)]
        if llm.cfg.num_rope_tables > 1:
            tables = list(zip(cos.chunk(2, -1), sin.chunk(2, -1), strict=True))
        bias = additive_mask(tokens, self.model.cfg.attention, self.dtype)
        x = flat.view_as(embeds)
        # As `LanguageModel.forward`, without holding every block's keys and values.
        for i, block in enumerate(llm.blocks):
            x, _ = block(x, *tables[llm.cfg.rope_table_of(i)], bias, None)
        return llm.norm(x)


def _aligned(tokens: PackedTokens) -> PackedTokens:
    """Rows of a length that fused attention takes a mask of without copying it."""
    short = -tokens.ids_RS.shape[1] % _ALIGNMENT
    columns = {
        f.name: F.pad(getattr(tokens, f.name), (0, short), value=PADDING.get(f.name, 0))
        for f in dataclasses.fields(tokens)
    }
    return PackedTokens(**columns)


def _drop_from_residuals(model: VideoLM, share: float) -> None:
    """Dropout on what attention and MLP add to the language model's residual stream."""

    def dropped(module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    def dropped_first(module: nn.Module, _arguments: object, output: tuple) -> tuple:
        return (F.dropout(output[0], share, module.training), *output[1:])

    for block in model.llm.blocks:
        if model.cfg.language.post_norm:
            block.get_submodule("attn_norm").register_forward_hook(dropped)
            block.get_submodule("mlp_norm").register_forward_hook(dropped)
        else:
            block.get_submodule("attn").register_forward_hook(dropped_first)
            block.get_submodule("mlp").register_forward_hook(dropped)
