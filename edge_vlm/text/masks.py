"""Who sees whom in the language model, as additive attention biases in numpy.

A token sees everything before it. Besides, tokens of the same *block* (the vision tokens of a
frame, or of all frames) see each other both ways. *Branches* are questions side by side after the
same past: none sees another.

Shape letters: s new tokens, p tokens before them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CAUSAL = -1
"""Block of a token that sees only what comes before it."""
MASKED = -30_000.0
"""Additive bias of a pair that must not attend: finite, so fp16-safe and never a NaN row."""

Ids = npt.NDArray[np.integer]
Bias = npt.NDArray[np.float32]
Rule = npt.NDArray[np.int32]
"""Who sees whom without a matrix, i32 [2, s]: the first of the new tokens that a token sees (from
there on up to itself, and the whole past), and its block (`CAUSAL`, or from 0)."""


def block_bias(block_ids: Ids, past: int = 0) -> Bias:
    """Block of each token [..., s] (`CAUSAL`, or from 0) -> f32 [..., s, p + s]: 0 where a row may
    look, MASKED elsewhere. All of the `past` p tokens are seen."""
    together = block_ids[..., :, None] == block_ids[..., None, :]
    together &= (block_ids >= 0)[..., :, None]
    return _additive(np.tri(block_ids.shape[-1], dtype=np.bool_) | together, past)


def branch_bias(branch_ids: Ids, past: int = 0) -> Bias:
    """Branch of each token [..., s] -> f32 [..., s, p + s]: a row sees the past and its own branch
    up to itself."""
    same = branch_ids[..., :, None] == branch_ids[..., None, :]
    return _additive(np.tri(branch_ids.shape[-1], dtype=np.bool_) & same, past)


def block_rule(block_ids: Ids) -> Rule:
    """`block_bias` in two numbers a token: see `Rule`."""
    return np.stack([np.zeros_like(block_ids), block_ids]).astype(np.int32)


def branch_rule(branch_ids: Ids) -> Rule:
    """`branch_bias` in two numbers a token; the tokens of a branch stand together."""
    _, first, branch = np.unique(branch_ids, return_index=True, return_inverse=True)
    return np.stack([first[branch], np.full_like(branch, CAUSAL)]).astype(np.int32)


def rule_bias(rule: Rule, past: int = 0) -> Bias:
    """f32 [s, p + s] of a rule."""
    first, blocks = rule[:, :, None]
    places = np.arange(rule.shape[1])
    visible = (first <= places) & (places <= places[:, None])
    return _additive(visible | ((blocks == rule[1]) & (blocks >= 0)), past)


def _additive(visible: npt.NDArray[np.bool_], past: int) -> Bias:
    rows, size = visible.shape[:-1], visible.shape[-1]
    bias = np.zeros((*rows, past + size), np.float32)
    bias[..., past:][~visible] = MASKED
    return bias
