"""Points and tracks in an answer: where the model says that something is.

Molmo2 points by text (arXiv 2601.10611, section 3): `<points coords="...">label</points>` and
`<tracks coords="...">label</tracks>`. Inside stand groups, separated by ";" (by a tab in the older
format): a time in seconds, or the number of a picture, and then triples `ID X Y`. X and Y are
thousandths of the picture's width and height, written with three or four digits; an object keeps
its ID through all groups.

This is the one reader, of what is drawn and of what is graded. It reads what the expressions on the
published model cards read:

- the whole triples of a half-broken group (`0.5 1 100 200 300` has one);
- no X or Y of fewer than three digits (`0.5 1 50 60`), none outside the picture (`0.5 1 1500 060`);
- nothing of a tag that was cut off, or whose coords hold anything but numbers and separators.

It is stricter in one thing: a number is read whole or not at all (`1 123 45678` is no point).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

SCALE = 1000
_TAG = re.compile(
    r"<(points|tracks)\b[^<>]*?\bcoords=\"([0-9\t:;, .]*)\"[^<>]*>(?:([^<]*)</(?:points|tracks)>)?"
)
_GROUP = re.compile(r"(?:^|[\t:,;])\s*([0-9]{1,9})(\.[0-9]{1,9})? ([0-9. ]+)")
_TRIPLE = re.compile(r"(?<![0-9.])([0-9]{1,9}) ([0-9]{3,4}) ([0-9]{3,4})(?![0-9.])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One place of one object."""

    kind: Literal["points", "tracks"]
    label: str
    """What the model calls it; empty when it says nothing."""
    object_id: int
    x: float
    """From the left edge, 0..1 of the picture's width."""
    y: float
    """From the top edge, 0..1 of the picture's height."""
    at: float
    """Seconds, or the number of a picture from 1."""
    is_time: bool
    """Whether `at` was written as a time, with a decimal point; pictures are counted in whole
    numbers."""


def parse_points(text: str) -> list[Point]:
    """All points and tracks of an answer, in the order in which they are written.

    Never raises: a text without any gives an empty list.
    """
    found = []
    for tag in _TAG.finditer(text):
        kind: Literal["points", "tracks"] = "tracks" if tag[1] == "tracks" else "points"
        for group in _GROUP.finditer(tag[2]):
            for triple in _TRIPLE.finditer(group[3]):
                x, y = int(triple[2]), int(triple[3])
                if max(x, y) > SCALE:
                    continue
                found.append(
                    Point(
                        kind=kind,
                        label=(tag[3] or "").strip(),
                        object_id=int(triple[1]),
                        x=x / SCALE,
                        y=y / SCALE,
                        at=float(f"{group[1]}{group[2] or ''}"),
                        is_time=group[2] is not None,
                    )
                )
    return found


def move_points(text: str, moved: Callable[[float], float]) -> str:
    """The text with the times of all its points and tracks moved; numbers of pictures stay."""

    def group(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[0]
        time = f"{match[1]}{match[2]}"
        return match[0].replace(time, f"{moved(float(time)):.{len(match[2]) - 1}f}", 1)

    def tag(match: re.Match[str]) -> str:
        return match[0].replace(match[2], _GROUP.sub(group, match[2]), 1)

    return _TAG.sub(tag, text)
