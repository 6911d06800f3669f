"""Who sees whom in a packed row: as a tensor, as an additive bias, and as a rule for kernels.

A query sees a key of its own clip only, and there
- in the prefix: everything before it, and if both are vision tokens also what comes later
  (`VisionAttention.ALL`: in any frame; `FRAME`: in the same frame);
- from a branch: the prefix up to the branch's last frame, and what comes before it in its branch.

Shape letters: R rows, S tokens of a row (queries Q, keys K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edge_vlm.config import VisionAttention
from edge_vlm.model.layers import additive_bias
from edge_vlm_training.data.packing.batch import NOWHERE, PackedTokens

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_rule(tokens: PackedTokens, attention: VisionAttention) -> Rule:
    """`rule(row, head, query, key)` -> bool, of index tensors that broadcast together.

    The form that `torch.nn.attention.flex_attention.create_block_mask` takes as `mask_mod`.
    """
    clip, branch, frame = tokens.clip_RS, tokens.branch_RS, tokens.frame_RS
    vision = tokens.vision_RS

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own_clip = (clip[row, query] == clip[row, key]) & (clip[row, query] != NOWHERE)
        both_ways = vision[row, query] & vision[row, key]
        if attention is VisionAttention.FRAME:
            both_ways = both_ways & (frame[row, query] == frame[row, key])
        # Inside one branch, or inside the prefix: there the branch of both is NOWHERE.
        same = (branch[row, query] == branch[row, key]) & ((key <= query) | both_ways)
        asked = (
            (branch[row, query] != NOWHERE)
            & (branch[row, key] == NOWHERE)
            & (frame[row, key] <= frame[row, query])
        )
        return own_clip & (same | asked)

    return rule


def allowed_mask(tokens: PackedTokens, attention: VisionAttention) -> Tensor:
    """bool [R, S, S], true where a query (rows) sees a key (columns); S^2 bytes a row."""
    rows, size = tokens.clip_RS.shape
    row = torch.arange(rows, device=tokens.clip_RS.device)[:, None, None]
    place = torch.arange(size, device=row.device)
    return mask_rule(tokens, attention)(row, row, place[None, :, None], place[None, None, :])


def additive_mask(tokens: PackedTokens, attention: VisionAttention, dtype: torch.dtype) -> Tensor:
    """[R, S, S] of `dtype`: 0 where a query sees a key, MASKED elsewhere (`LanguageModel`)."""
    return additive_bias(allowed_mask(tokens, attention), dtype)
