"""A batch's questions through the language model, in either form.

Shape letters: R rows, S tokens of a row, B clips, P prefix tokens, F frames, G kept cells, A answer
tokens, V vocabulary, D language width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.model.llm import rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.data.packing.batch import (
    IGNORED,
    PADDING,
    Batch,
    PackedBatch,
    PackedTokens,
)
from edge_vlm_training.data.packing.masks import additive_mask
from edge_vlm_training.data.packing.prefix import as_prefixes
from edge_vlm_training.objective.vision import SeenClips

STORY_BLOCKS = 2
"""How many blocks before the last have their vision tokens read by probes."""
_ALIGNMENT = 8


class AnswerTokens(NamedTuple):
    """What the model says where an answer's token is to be learned."""

    logits_AV: Tensor
    target_A: Tensor
    weight_A: Tensor
    branch_A: Tensor
    """Number of the branch to which each belongs."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What the language model made of a batch."""

    answers: AnswerTokens
    hidden: list[Tensor]
    """[G, D] vision tokens after each of `STORY_BLOCKS` blocks from the end, if probed."""
    ends: list[Tensor]
    """[F, D] end markers of the frames after the same blocks."""
    row_tokens_R: Tensor
    """int64: tokens of each row after the drop."""


def read(
    model: VideoLM, batch: Batch, seen: SeenClips, dtype: torch.dtype, *, probed: bool = False
) -> Answered:
    """Every question's answer tokens; `dtype` is that of the masks. What probes read is there if
    it is `probed`."""
    if not isinstance(batch, PackedBatch):
        raise TypeError("a batch without questions has nothing to read")
    tokens = batch.pruned(seen.kept_FC)
    blocks = model.llm.blocks[-1 - STORY_BLOCKS : -1] if probed else ()
    way = _by_prefixes if batch.form == "prefix" else _by_rows
    with _outputs(blocks) as outputs:
        laid, answers = way(model, tokens, seen.features_GE, dtype)
    # Prefixes come first; questions go through the same blocks after them.
    outputs = [x.flatten(0, 1) for x in outputs[: len(blocks)]]
    places, ends = laid.patch_places(), laid.frame_ends(len(seen.kept_FC))
    return Answered(
        answers, [x[places] for x in outputs], [x[ends] for x in outputs], tokens.lengths_R
    )


def row_states(
    model: VideoLM, tokens: PackedTokens, features_GE: Tensor, dtype: torch.dtype
) -> Tensor:
    """[R, S, D] after the last norm; `features` are those of the patch tokens in order."""
    llm = model.llm
    x = _embeds(model, tokens, features_GE)
    cos, sin = rope_tables(llm.cfg, tokens.positions_RS)
    tables = [(cos, sin)]
    if llm.cfg.num_rope_tables > 1:
        tables = list(zip(cos.chunk(2, -1), sin.chunk(2, -1), strict=True))
    bias = additive_mask(tokens, model.cfg.attention, dtype)
    # As `LanguageModel.forward`, without holding every block's keys and values.
    for i, block in enumerate(llm.blocks):
        x, _ = block(x, *tables[llm.cfg.rope_table_of(i)], bias, None)
    hidden: Tensor = llm.norm(x)
    return hidden


def _by_rows(
    model: VideoLM, tokens: PackedTokens, features_GE: Tensor, dtype: torch.dtype
) -> tuple[PackedTokens, AnswerTokens]:
    """As they are; also how the clips' tokens were laid out."""
    tokens = _aligned(tokens)
    return tokens, _answers(model, row_states(model, tokens, features_GE, dtype), tokens)


def _by_prefixes(
    model: VideoLM, tokens: PackedTokens, features_GE: Tensor, dtype: torch.dtype
) -> tuple[PackedTokens, AnswerTokens]:
    """One pass over the videos, then all questions over their keys and values."""
    llm = model.llm
    laid = as_prefixes(tokens, model.cfg.attention, dtype)
    embeds = _embeds(model, laid.prefix, features_GE)
    _, video = llm(embeds, *rope_tables(llm.cfg, laid.prefix.positions_RS), laid.bias_BPP)
    found = []
    for bucket in laid.buckets:
        past = [(_rows(k, bucket.clip_N), _rows(v, bucket.clip_N)) for k, v in video]
        tables = rope_tables(llm.cfg, bucket.tokens.positions_RS)
        hidden, _ = llm(llm.embed(bucket.tokens.ids_RS), *tables, bucket.bias_NLK, past)
        found.append(_answers(model, hidden, bucket.tokens))
    return laid.prefix, AnswerTokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _answers(model: VideoLM, hidden_RSD: Tensor, tokens: PackedTokens) -> AnswerTokens:
    trained = (tokens.target_RS != IGNORED).flatten().nonzero().squeeze(1)
    columns = tokens.target_RS, tokens.weight_RS, tokens.branch_RS
    target, weight, branch = (x.flatten()[trained] for x in columns)
    return AnswerTokens(model.llm.head(hidden_RSD.flatten(0, 1)[trained]), target, weight, branch)


def _embeds(model: VideoLM, tokens: PackedTokens, features_GE: Tensor) -> Tensor:
    embeds: Tensor = model.llm.embed(tokens.ids_RS)
    flat = embeds.flatten(0, 1)
    flat = flat.index_add(0, tokens.patch_places(), features_GE.to(flat.dtype))
    return flat.view_as(embeds)


def _aligned(tokens: PackedTokens) -> PackedTokens:
    """Rows of a length that fused attention takes a mask of without copying it."""
    short = -tokens.ids_RS.shape[1] % _ALIGNMENT
    columns = {
        f.name: F.pad(getattr(tokens, f.name), (0, short), value=PADDING.get(f.name, 0))
        for f in dataclasses.fields(tokens)
    }
    return PackedTokens(**columns)


def _rows(x_BPhd: Tensor, index_N: Tensor) -> Tensor:
    """Rows by number, as a product: the gradient of an indexed read is slow on a CPU."""
    choice = F.one_hot(index_N, len(x_BPhd)).to(x_BPhd.dtype)
    return (choice @ x_BPhd.flatten(1)).view(len(index_N), *x_BPhd.shape[1:])


@contextlib.contextmanager
def _outputs(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the hidden states after `blocks` while it is open."""
    found: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: found.append(out[0])) for b in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
