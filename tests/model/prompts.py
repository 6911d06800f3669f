"""Prompts as tensors for the model tests: who sees whom, and one language forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edge_vlm.model.llm import KeyValue, rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.masks import MASKED


def attention_bias(blocks: Sequence[int], start: int, stop: int) -> Tensor:
    """Additive bias [1, stop - start, stop] of the tokens start..stop; `blocks` as in `read`."""
    block = torch.tensor(blocks)[:stop]
    query = torch.arange(start, stop)
    causal = torch.arange(stop)[None] <= query[:, None]
    together = (block[None] == block[query][:, None]) & (block[query] >= 0)[:, None]
    return torch.where(causal | together, 0.0, MASKED)[None]


def read(
    model: VideoLM,
    embeds_tE: Tensor,
    blocks: Sequence[int],
    start: int = 0,
    past: Sequence[KeyValue] | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """Reads tokens from `start` on: their logits [s, V] and the keys and values of all tokens.

    `blocks` numbers all tokens so far: -1 is causal text, equal numbers see each other both ways.
    """
    stop = start + len(embeds_tE)
    cos, sin = rope_tables(model.cfg.language, torch.arange(start, stop)[None])
    hidden, new = model.llm(embeds_tE[None], cos, sin, attention_bias(blocks, start, stop), past)
    if past is not None:
        new = [
            (torch.cat([k0, k1], 1), torch.cat([v0, v1], 1))
            for (k0, v0), (k1, v1) in zip(past, new, strict=True)
        ]
    return model.llm.head(hidden[0]), new


def cut(past: Sequence[KeyValue], length: int) -> list[KeyValue]:
    """The first `length` tokens of a cache."""
    return [(k[:, :length], v[:, :length]) for k, v in past]
