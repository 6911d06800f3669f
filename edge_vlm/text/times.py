"""Times in an answer: `at 3.5 s`, `from 3.0 to 4.5 seconds`."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = r"s|secs?|seconds?"
_TIME = re.compile(
    rf"(?P<length>\b(?:for|last(?:s|ed|ing)?|takes?|took|every|each|within|past|next)\s+"
    rf"(?:(?:about|around|the)\s+)*)?"
    rf"(?<![\d.,:])(?P<first>{_NUMBER})"
    rf"(?P<between>\s*(?:{_UNIT})?\s*(?:to|and|until|or|[-\u2013])\s*)?"
    rf"(?(between)(?P<second>{_NUMBER}))(?P<unit>\s*(?:{_UNIT})\b)"
    rf"(?P<after>\s+(?:long|later|ago|earlier|before|after|apart)\b)?",
    re.IGNORECASE,
)
"""With `length` or `after` it is how long, not when."""


def move_times(text: str, moved: Callable[[float], float]) -> str:
    """The text with each time that says when, in seconds, replaced by what `moved` makes of it."""

    def replaced(match: re.Match[str]) -> str:
        if match["length"] or match["after"]:
            return match[0]
        first, between, second = match["first"], match["between"] or "", match["second"]
        end = "" if second is None else _written(moved(float(second)), second)
        return f"{_written(moved(float(first)), first)}{between}{end}{match['unit']}"

    return _TIME.sub(replaced, text)


def _written(time_s: float, as_in: str) -> str:
    """With as many decimals as the model wrote, but half seconds stay half."""
    return f"{time_s:.{max(len(as_in.partition('.')[2]), 1)}f}"
