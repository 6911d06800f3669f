"""The loss of a stage on a batch: weighted terms that add up over batches and processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.data.packing.batch import Batch, PackedBatch, PackedTokens
from edge_vlm_training.objective.language import read, row_states
from edge_vlm_training.objective.losses import exact_answers
from edge_vlm_training.objective.terms import Forward, Totals, compute, reads
from edge_vlm_training.objective.vision import SeenClips, aux_count, see_clips, to_pixel_values
from edge_vlm_training.recipes.base import NEED_TRUTH, Term


def totals_of(batches: Sequence[Batch], num_cells: int) -> Tensor:
    """This process's part of `Totals`, f32 [3]: known before anything is computed."""
    packed = [batch for batch in batches if isinstance(batch, PackedBatch)]
    weight = sum(float(batch.tokens.weight_RS.sum()) for batch in packed)
    cells = sum(aux_count(batch.frames_per_clip, num_cells) for batch in batches)
    return torch.tensor([weight, float(cells), float(len(batches))])


@dataclasses.dataclass(frozen=True)
class BatchSums:
    """What a batch adds to an update. `loss` carries the gradient, the rest is for the report."""

    loss: Tensor
    sums: Tensor
    """f32 [len(SUMS)], detached."""
    numbers: dict[str, float]
    """What probes got right in this batch."""
    kept_F: Tensor
    """int64: cells kept of each frame."""
    row_tokens_R: Tensor
    """int64: tokens of each row after the drop; none where nothing was asked."""
    right: Tensor
    """bool for each branch of rendered clips: every token of its answer is the arg-max."""


SUMS = ("loss", "answer", "z", "aux", "right", "trained", "kept", "cells", "tokens")


class Objective(nn.Module):
    """The model, its probes and its loss; the module that is sharded, so that every use goes
    through it. `terms` may be set anew for each stage."""

    METHODS = ("see", "hidden_states", "logits")
    """Entry points besides `forward`."""

    def __init__(
        self,
        model: VideoLM,
        terms: Sequence[Term],
        probes: nn.ModuleDict | None = None,
        *,
        residual_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
    ) -> None:
        """`dtype` is that of the products: by autocast, or because the weights are in it."""
        super().__init__()
        self.model, self.probes = model, probes if probes is not None else nn.ModuleDict()
        self.terms = tuple(terms)
        self.vision_learns = True
        self.dtype, self.autocast = dtype, autocast and dtype is not torch.float32
        if residual_dropout:
            _drop_from_residuals(model, residual_dropout)

    def forward(self, batch: Batch, totals: Totals, num_ranks: int = 1) -> BatchSums:
        """The loss is this batch's share of the whole update's, times `num_ranks`, because the
        gradients of processes are averaged."""
        depth = max(reads(term) for term in self.terms)
        with self._precision():
            pixels = to_pixel_values(batch.frames_FSS3, self.model.cfg.vision, self.dtype)
            at = Forward(self.model, self.probes, batch, totals, pixels)
            if depth:
                at.seen = self._see(batch, pixels)
            if depth > 1:
                probed = any(isinstance(term, NEED_TRUTH) for term in self.terms)
                at.answered = read(self.model, batch, at.clips, self.dtype, probed=probed)
            loss = torch.zeros((), device=pixels.device)
            for term in self.terms:
                loss = loss + term.weight * compute(term, at)
        return self._summed(loss, at, num_ranks)

    def _summed(self, loss: Tensor, at: Forward, num_ranks: int) -> BatchSums:
        none = torch.zeros(0, dtype=torch.int64)
        kept_F, rows, right = none, none, none.bool()
        rendered = at.batch.truth is not None
        if at.seen is not None:
            kept_F = at.seen.kept_FC.sum(1)
            at.sums |= {"aux": at.seen.aux_sum, "kept": kept_F.sum()}
            at.sums["cells"] = (~at.batch.evicted_F()).sum() * at.seen.kept_FC.shape[1]
            if rendered:
                at.numbers["scale"] = float(
                    at.seen.features_GE.detach().float().square().mean().sqrt()
                )
        if at.answered is not None:
            rows = at.answered.row_tokens_R
            logits, target, _, branch = at.answered.answers
            if rendered:
                right = exact_answers(logits.detach(), target, branch, len(at.batch.branch_kinds))
            at.sums |= {"trained": torch.tensor(len(target)), "tokens": rows.sum()}
        at.sums["loss"] = loss
        zero = torch.zeros(())
        sums = [at.sums.get(name, zero).detach().float().to(loss.device) for name in SUMS]
        return BatchSums(loss * num_ranks, torch.stack(sums), at.numbers, kept_F, rows, right)

    def see(self, batch: Batch) -> SeenClips:
        """Prunes and encodes the clips of a batch."""
        with self._precision():
            pixels = to_pixel_values(batch.frames_FSS3, self.model.cfg.vision, self.dtype)
            return self._see(batch, pixels)

    def hidden_states(self, tokens: PackedTokens, features_GE: Tensor) -> Tensor:
        """[R, S, D] after the last norm; `features` are those of the patch tokens in order."""
        with self._precision():
            return row_states(self.model, tokens, features_GE, self.dtype)

    def logits(self, hidden_AD: Tensor) -> Tensor:
        """[A, V]"""
        with self._precision():
            logits: Tensor = self.model.llm.head(hidden_AD)
            return logits

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        device = self.model.llm.norm.weight.device.type
        return torch.autocast(device, self.dtype, enabled=self.autocast)

    def _see(self, batch: Batch, pixels_FNP: Tensor) -> SeenClips:
        # A frozen side takes the faster attention of inference.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_learns):
            return see_clips(
                self.model,
                pixels_FNP,
                batch.frames_per_clip,
                batch.keep_ratio,
                batch.min_cells,
                self.dtype,
                selection=batch.selection,
                seed=batch.seed,
                reuse=batch.reuse,
                evicted_F=batch.evicted_F() if any(batch.evicted) else None,
            )


Outputs = tuple[Tensor, ...]


def _drop_from_residuals(model: VideoLM, share: float) -> None:
    """Dropout on what attention and MLP add to the language model's residual stream."""

    def dropped(module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    def dropped_first(
        module: nn.Module, _arguments: object, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return (F.dropout(output[0], share, module.training), *output[1:])

    for block in model.llm.blocks:
        if model.cfg.language.post_norm:
            block.get_submodule("attn_norm").register_forward_hook(dropped)
            block.get_submodule("mlp_norm").register_forward_hook(dropped)
        else:
            block.get_submodule("attn").register_forward_hook(dropped_first)
            block.get_submodule("mlp").register_forward_hook(dropped)
