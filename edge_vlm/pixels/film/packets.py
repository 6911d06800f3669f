"""The packets of a video that is not decoded, in the order of the screen. No library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_vlm.pixels.film.timeline import LONGEST_GAP_S

_REORDERED = 17
"""Frames that may lie between a frame's place in a file and its place on the screen."""
_BACK_S = 0.25
"""Times that go back by less are inexact."""


@dataclass(frozen=True)
class FramePacket:
    """One undecoded frame."""

    time_s: float | None
    """On the file's own clock; None in a raw stream."""
    length_s: float | None
    is_key: bool
    """Decoding can begin with it."""


def clock_jumps(
    time_s: float, decoded_s: float | None, last_s: float, highest_s: float, length_s: float
) -> bool:
    """Whether another clock begins, in the order in which frames are decoded."""
    if highest_s == -math.inf:
        return False
    if decoded_s is not None and last_s > -math.inf:
        return not last_s - _BACK_S <= decoded_s <= last_s + LONGEST_GAP_S + length_s
    reordered_s = max(_BACK_S, _REORDERED * length_s)
    return not highest_s - reordered_s <= time_s <= highest_s + LONGEST_GAP_S + length_s


def as_shown(piece: list[FramePacket], was_without: bool) -> list[FramePacket]:
    """In the order of the screen. `was_without`: what came before its keyframe is gone, and with
    it what is shown before that."""
    if any(packet.time_s is None for packet in piece):
        return piece
    shown = sorted(piece, key=lambda packet: packet.time_s or 0.0)
    if was_without:
        first = next(i for i, packet in enumerate(shown) if packet.is_key)
        shown = shown[first:]
    return shown
