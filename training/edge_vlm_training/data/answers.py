"""How points and counts are written in an answer (arXiv 2601.10611; read by `text.points`).

`<points coords="0.5 1 250 500 2 031 700;1.0 1 260 500">cats</points>`: groups of one time each, in
seconds with one decimal, then object, x and y in thousandths with at least three digits, sorted by
time, x and y.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

NONE = "There are none."


class Place(NamedTuple):
    """Object `number` (from 1) at a time, x and y in 0..1 from the picture's top left."""

    time_s: float
    x: float
    y: float
    number: int


def points_text(places: Iterable[Place], label: str) -> str:
    """The tag with all places; what is not there at all is `NONE`."""
    ordered = sorted(
        (round(p.time_s, 1), round(1000 * p.x), round(1000 * p.y), p.number) for p in places
    )
    if not ordered:
        return NONE
    groups = []
    for time_s, group in itertools.groupby(ordered, key=lambda place: place[0]):
        triples = " ".join(f"{number} {x:03d} {y:03d}" for _, x, y, number in group)
        groups.append(f"{time_s:.1f} {triples}")
    return f'<points coords="{";".join(groups)}">{label}</points>'


def count_text(count: int, places: Iterable[Place], label: str) -> str:
    """A count: with places the sentence that points first, which is counted better; else a number.

    Raises ValueError if the places show another number of objects.
    """
    places = list(places)
    if not places:
        return str(count) if count else NONE
    shown = len({place.number for place in places})
    if shown != count:
        raise ValueError(f"count is {count}, but the points show {shown} objects")
    return f"Counting the {points_text(places, label)} shows a total of {count}."
