"""The decode loop."""

from __future__ import annotations

from collections.abc import Collection, Generator

import numpy as np

from edge_vlm_runtime.inference.constraints import Matcher
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
    matcher: Matcher | None = None,
) -> Generator[int, None, str]:
    """Yields the answer's tokens, at most `max_tokens`, without the end token (any of `eos_ids`).

    `logits` are those behind the prompt. The first token needs no run, each later one a single
    decode step; the last one is never appended to the arena. Returns "stop" after an end token or
    "length"; with a `matcher`, "stop" as soon as what it demands is complete, without one more run.
    Dropping the iterator cancels the answer: the caller truncates the arena.
    """
    ends = frozenset(eos_ids)
    sampler = Sampler(sampling)
    for num_left in range(max_tokens - 1, -1, -1):
        if matcher is not None:
            matcher.mask(logits)
        token = sampler.sample(logits)
        if token in ends:
            return "stop"
        if matcher is not None:
            matcher.take(token)
        yield token
        if matcher is not None and matcher.is_complete:
            return "stop"
        if num_left:
            logits = lm.decode_step(arena, token)
    return "length"
