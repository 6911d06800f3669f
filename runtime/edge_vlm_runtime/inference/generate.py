"""The decode loop."""

from __future__ import annotations

from collections.abc import Collection, Generator

import numpy as np

from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.language import LanguageModel
from edge_vlm_runtime.inference.sampling import Sampler, Sampling


def generate(
    lm: LanguageModel,
    arena: KVArena,
    logits: np.ndarray,
    sampling: Sampling,
    eos_ids: Collection[int],
    max_tokens: int,
) -> Generator[int, None, str]:
    """Yields the answer's tokens, at most `max_tokens`, without the end token (any of `eos_ids`).

    `logits` are those behind the prompt. The first token needs no run, each later one a single
    decode step; the last one is never appended to the arena. Returns "stop" after an end token or
    "length". Dropping the iterator cancels the answer: the caller truncates the arena.
    """
    ends = frozenset(eos_ids)
    sampler = Sampler(sampling)
    for num_left in range(max_tokens - 1, -1, -1):
        token = sampler.sample(logits)
        if token in ends:
            return "stop"
        yield token
        if num_left:
            logits = lm.decode_step(arena, token)
    return "length"
