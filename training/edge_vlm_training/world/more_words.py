"""Weights of a model with fewer words, for one that knows more of the same world."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

_EMBED, _HEAD = "llm.embed.weight", "llm.head.weight"
_NEW_SCALE = 0.5
"""Of a new word's noise, in standard deviations of the known words: it must differ from them, and
its mean lies where words do."""


def vocabulary_of(tokenizer: Path) -> dict[str, int]:
    """Ids of a word-level `tokenizer.json` by token. Raises ValueError on another file."""
    model = json.loads(tokenizer.read_text()).get("model", {})
    if model.get("type") != "WordLevel":
        raise ValueError(f"{tokenizer} is not a word-level tokenizer")
    vocabulary: dict[str, int] = model["vocab"]
    return vocabulary


def with_more_words(
    weights: dict[str, Tensor],
    known: dict[str, int],
    wanted: dict[str, int],
    head_rows: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`weights` with the rows of the embedding and of the head moved to their words' new ids.

    `head_rows` is the number of `wanted` words, the first ones, that the head covers. Words that
    are not `known` begin near the mean of the others. Raises ValueError when a known word is gone.
    """
    if missing := known.keys() - wanted.keys():
        raise ValueError(f"the new vocabulary lacks {sorted(missing)[0]!r}")
    generator = torch.Generator().manual_seed(seed)
    grown = dict(weights)
    for name, rows in ((_EMBED, len(wanted)), (_HEAD, head_rows)):
        old = weights[name].float()
        noise = torch.randn(rows, old.shape[1], generator=generator)
        new = old.mean(0) + _NEW_SCALE * old.std(0) * noise
        for word, row in known.items():
            if row < len(old):
                new[wanted[word]] = old[row]
        grown[name] = new.to(weights[name].dtype)
    return grown
