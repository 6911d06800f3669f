"""A batch's questions through the language model, in either form.

Shape letters: R rows, S tokens of a row, B clips, P prefix tokens, F frames, G kept cells, A answer
tokens, V vocabulary, D language width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.model.llm import rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.data.packing.batch import (
    IGNORED,
    NOWHERE,
    PADDING,
    Batch,
    PackedBatch,
    PackedTokens,
)
from edge_vlm_training.data.packing.masks import additive_mask
from edge_vlm_training.data.packing.prefix import PrefixBatch
from edge_vlm_training.objective.vision import SeenClips

STORY_BLOCKS = 2
"""How many blocks before the last have their vision tokens read by probes."""
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Answered:
    """What the language model made of a batch."""

    logits_AV: Tensor
    target_A: Tensor
    weight_A: Tensor
    branch_A: Tensor
    """Number of the branch to which each answer token belongs."""
    hidden: list[Tensor]
    """[G, D] vision tokens after each of `STORY_BLOCKS` blocks from the end."""
    ends: list[Tensor]
    """[F, D] end markers of the frames after the same blocks."""
    row_tokens_R: Tensor
    """int64: tokens of each row (of each clip, with its questions) after the drop."""


def read(
    model: VideoLM, batch: Batch, seen: SeenClips, dtype: torch.dtype, *, probed: bool = False
) -> Answered:
    """Every question's answer tokens; `dtype` is that of the masks. What probes read is there if
    it is `probed`."""
    blocks = model.llm.blocks[-1 - STORY_BLOCKS : -1] if probed else ()
    if isinstance(batch, PrefixBatch):
        return _read_prefix(model, batch, seen, dtype, blocks)
    if isinstance(batch, PackedBatch):
        return _read_rows(model, batch, seen, dtype, blocks)
    raise TypeError("a batch without questions has nothing to read")


def row_states(
    model: VideoLM, tokens: PackedTokens, features_GE: Tensor, dtype: torch.dtype
) -> Tensor:
    """[R, S, D] after the last norm; `features` are those of the patch tokens in order."""
    llm = model.llm
    embeds = llm.embed(tokens.ids_RS)
    flat = embeds.flatten(0, 1)
    flat = flat.index_add(0, tokens.patch_places(), features_GE.to(flat.dtype))
    cos, sin = rope_tables(llm.cfg, tokens.positions_RS)
    tables = [(cos, sin)]
    if llm.cfg.num_rope_tables > 1:
        tables = list(zip(cos.chunk(2, -1), sin.chunk(2, -1), strict=True))
    bias = additive_mask(tokens, model.cfg.attention, dtype)
    x = flat.view_as(embeds)
    # As `LanguageModel.forward`, without holding every block's keys and values.
    for i, block in enumerate(llm.blocks):
        x, _ = block(x, *tables[llm.cfg.rope_table_of(i)], bias, None)
    return llm.norm(x)


def _read_rows(
    model: VideoLM,
    batch: PackedBatch,
    seen: SeenClips,
    dtype: torch.dtype,
    blocks: Iterable[nn.Module],
) -> Answered:
    tokens = _aligned(batch.pruned(seen.kept_FC))
    with _outputs(blocks) as outputs:
        hidden = row_states(model, tokens, seen.features_GE, dtype)
    trained = (tokens.target_RS != IGNORED).flatten()
    places, ends = tokens.patch_places(), _frame_ends(tokens, len(seen.kept_FC))
    return Answered(
        model.llm.head(hidden.flatten(0, 1)[trained]),
        *(x.flatten()[trained] for x in (tokens.target_RS, tokens.weight_RS, tokens.branch_RS)),
        [x.flatten(0, 1)[places] for x in outputs],
        [x.flatten(0, 1)[ends] for x in outputs],
        tokens.lengths_R,
    )


def _frame_ends(tokens: PackedTokens, num_frames: int) -> Tensor:
    """Place in the flattened rows of the last prefix token of each frame: its end marker."""
    prefix = ((tokens.branch_RS == NOWHERE) & (tokens.clip_RS != NOWHERE)).flatten()
    places = prefix.nonzero().squeeze(1)
    last = torch.zeros(num_frames, dtype=torch.int64, device=places.device)
    return last.scatter_reduce_(0, tokens.frame_RS.flatten()[places], places, "amax")


def _aligned(tokens: PackedTokens) -> PackedTokens:
    """Rows of a length that fused attention takes a mask of without copying it."""
    short = -tokens.ids_RS.shape[1] % _ALIGNMENT
    columns = {
        f.name: F.pad(getattr(tokens, f.name), (0, short), value=PADDING.get(f.name, 0))
        for f in dataclasses.fields(tokens)
    }
    return PackedTokens(**columns)


def _read_prefix(
    model: VideoLM,
    batch: PrefixBatch,
    seen: SeenClips,
    dtype: torch.dtype,
    blocks: Iterable[nn.Module],
) -> Answered:
    """One pass over the videos, then all questions over their keys and values."""
    llm = model.llm
    tokens = batch.kept(seen.kept_FC, model.cfg.attention, dtype)
    embeds = llm.embed(tokens.ids_BP)
    places = (tokens.ids_BP == batch.prompt.patch_id).flatten().nonzero().squeeze(1)
    flat = embeds.flatten(0, 1).index_add(0, places, seen.features_GE.to(embeds.dtype))
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    with _outputs(blocks) as outputs:
        tables = rope_tables(llm.cfg, positions)
        _, video = llm(flat.view_as(embeds), *tables, tokens.bias_BPP)
    logits = []
    for bucket in tokens.buckets:
        past = [(_rows(k, bucket.clip_N), _rows(v, bucket.clip_N)) for k, v in video]
        tables = rope_tables(llm.cfg, bucket.positions_NL)
        hidden, _ = llm(llm.embed(bucket.ids_NL), *tables, bucket.bias_NLK, past)
        logits.append(llm.head(hidden.flatten(0, 1)[bucket.answer_index_A]))
    return Answered(
        torch.cat(logits),
        *(
            torch.cat([getattr(bucket, name) for bucket in tokens.buckets])
            for name in ("target_A", "weight_A", "branch_A")
        ),
        [x.flatten(0, 1)[places] for x in outputs],
        [x.flatten(0, 1)[tokens.end_F] for x in outputs],
        tokens.lengths_B,
    )


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
