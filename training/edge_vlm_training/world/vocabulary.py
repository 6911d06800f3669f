"""A word-level vocabulary for small models, in the file format of the published tokenizers.

A word carries the space before it (" red"), digits and punctuation stand alone, so that joining
tokens gives the text back exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edge_vlm.text.prompt import FRAME_END, FRAME_START, IM_END, IM_START, PAD, PATCH

UNKNOWN = "<unk>"
READ_ONLY = (FRAME_START, FRAME_END, PATCH)
"""Tokens of the prompt that are never generated: the head does not cover them."""
_PIECE = r" ?[a-z]+| ?[0-9]|\s|."


def build_tokenizer(texts: Iterable[str], path: Path) -> tuple[int, int]:
    """Writes `tokenizer.json` covering all of `texts`; returns (base, extra) vocabulary sizes."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces: set[str] = {"\n", " ", ".", "?", "user", "assistant"}
    pieces |= {f"{space}{digit}" for space in ("", " ") for digit in range(10)}
    for text in texts:
        pieces.update(re.findall(_PIECE, text.lower()))
    base = [PAD, UNKNOWN, IM_END, IM_START, *sorted(pieces)]
    vocabulary = {token: i for i, token in enumerate([*base, *READ_ONLY])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    specials = (PAD, IM_END, IM_START, *READ_ONLY)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    backend.save(str(path))
    return len(base), len(READ_ONLY)
