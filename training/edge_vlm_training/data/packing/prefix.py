"""Packed tokens once more: each clip as a prefix, and its questions side by side after it.

A question sees its clip up to the frame after which it is asked: exactly a live session's view at
that moment, so one pass over a clip trains many moments. Its prefix's keys and values are the past
that all of its questions read; questions of like length run side by side. Who sees whom is decided
by `masks`, as in a packed row.

Shape letters: B clips, P prefix tokens (padded), N questions of a bucket, L their tokens (padded),
K = P + L.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from edge_vlm.config import VisionAttention
from edge_vlm.model.layers import additive_bias
from edge_vlm_training.data.packing.batch import NOWHERE, PADDING, PackedTokens
from edge_vlm_training.data.packing.masks import additive_mask

BUCKETS = (0.5, 0.8, 0.9, 0.96, 1.0)
"""Where the questions, sorted by length, are cut: few are long (dialogue before them, points), and
with equal parts more than half of all tokens were padding."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Questions of like length; additive bias over prefix and own tokens."""

    clip_N: Tensor
    tokens: PackedTokens
    """[N, L]: a question in each row."""
    bias_NLK: Tensor
    """The prefix comes first."""


@dataclasses.dataclass(frozen=True)
class PrefixTokens:
    """Packed tokens in this form."""

    prefix: PackedTokens
    """[B, P]: a clip in each row."""
    bias_BPP: Tensor
    buckets: tuple[Bucket, ...]


def as_prefixes(
    tokens: PackedTokens, attention: VisionAttention, dtype: torch.dtype
) -> PrefixTokens:
    """The same tokens; biases are of `dtype`. Cells that are dropped have left `tokens` already."""
    flat = {f.name: getattr(tokens, f.name).flatten() for f in dataclasses.fields(tokens)}
    clip, branch = flat["clip_RS"], flat["branch_RS"]
    asked = branch != NOWHERE
    prefix = _table(flat, ((clip != NOWHERE) & ~asked).nonzero().squeeze(1), clip)
    lengths = torch.bincount(branch[asked])
    order = lengths.argsort(stable=True)
    cuts = sorted({0, *(round(share * len(order)) for share in BUCKETS)})
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).to(order))
    rank_of = rank[branch.clamp(min=0)]
    buckets = []
    for start, end in itertools.pairwise(cuts):
        places = (asked & (rank_of >= start) & (rank_of < end)).nonzero().squeeze(1)
        own = _table(flat, places, rank_of - start)
        clip_N, frame_N = own.clip_RS[:, 0], own.frame_RS[:, 0]
        size = own.ids_RS.shape[1]
        seen = (prefix.clip_RS != NOWHERE)[clip_N] & (prefix.frame_RS[clip_N] <= frame_N[:, None])
        past = additive_bias(seen[:, None].expand(-1, size, -1), dtype)
        bias = torch.cat([past, additive_mask(own, attention, dtype)], -1)
        buckets.append(Bucket(clip_N, own, bias))
    return PrefixTokens(prefix, additive_mask(prefix, attention, dtype), tuple(buckets))


def _table(flat: dict[str, Tensor], places: Tensor, row: Tensor) -> PackedTokens:
    """The tokens at `places` in rows of their own: number `row` of each, in their order."""
    row_P = row[places]
    order = row_P.argsort(stable=True)
    places, row_P = places[order], row_P[order]
    lengths = torch.bincount(row_P)
    column_P = torch.arange(len(row_P), device=row.device) - (lengths.cumsum(0) - lengths)[row_P]
    shape = len(lengths), int(lengths.max())
    columns = {
        name: values.new_full(shape, PADDING.get(name, 0)).index_put_(
            (row_P, column_P), values[places]
        )
        for name, values in flat.items()
    }
    return PackedTokens(**columns)
