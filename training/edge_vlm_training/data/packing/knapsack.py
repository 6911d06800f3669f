"""Which of the waiting examples fill a row best: a 0/1 knapsack under two limits.

Molmo2's packer (arXiv 2601.10611, section 4): dynamic programming over tokens, counted in units of
32, and frames; the most tokens win, and frames count as 30 tokens so that both limits fill up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOKEN_UNIT = 32
FRAME_VALUE = 30


def fill_row(
    tokens: Sequence[int], frames: Sequence[int], max_tokens: int, max_frames: int
) -> list[int]:
    """Ascending numbers of the chosen examples; the first one, which waits longest, is among them.

    Raises ValueError without examples or if the first does not fit alone.
    """
    if not tokens:
        raise ValueError("there is nothing to choose from")
    if tokens[0] > max_tokens or frames[0] > max_frames:
        raise ValueError(
            f"{tokens[0]} tokens and {frames[0]} frames do not fit a row of {max_tokens} tokens "
            f"and {max_frames} frames"
        )
    room, seats = (max_tokens - tokens[0]) // TOKEN_UNIT, max_frames - frames[0]
    value = np.zeros((room + 1, seats + 1), np.int64)
    taken = np.zeros((len(tokens), room + 1, seats + 1), np.bool_)
    for i in range(1, len(tokens)):
        units, held = -(-tokens[i] // TOKEN_UNIT), frames[i]
        if units > room or held > seats:
            continue
        with_it = value[: room + 1 - units, : seats + 1 - held] + (
            tokens[i] + FRAME_VALUE * frames[i]
        )
        better = with_it > value[units:, held:]
        taken[i, units:, held:] = better
        value[units:, held:][better] = with_it[better]
    chosen = []
    for i in range(len(tokens) - 1, 0, -1):
        if taken[i, room, seats]:
            chosen.append(i)
            room -= -(-tokens[i] // TOKEN_UNIT)
            seats -= frames[i]
    return [0, *reversed(chosen)]
