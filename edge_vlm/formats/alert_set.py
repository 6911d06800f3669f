"""A folder of footage with yes/no questions and the times at which each is true: how stages hand
each other what alerts are measured on.

`footage.jsonl` holds one stretch of footage a line, `frames/NAME-I.jpg` its pictures::

    {"name": "0007", "times_s": [0.0, 0.5, 1.0], "watches": [
      {"question": "Is there a cat now?", "events": [[0.5, 1.5]]}]}

An event is true from its first time on, and no more at its second one. Write such a folder to
measure on footage of your own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.formats.picture_index import PictureIndex, Pictures

INDEX = "footage.jsonl"
SET = PictureIndex(
    file=INDEX,
    kind="event set",
    part="footage",
    made_by="edge-vlm world --events 40 --out FOLDER",
)


@dataclass(frozen=True, kw_only=True)
class LabelledAlert:
    """A yes/no question and when its answer is yes: [begin, end) in seconds, in order."""

    question: str
    events: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        last_s = float("-inf")
        for begin_s, end_s in self.events:
            if not last_s <= begin_s < end_s:
                raise ValueError(f"events of {self.question!r} must follow each other in time")
            last_s = end_s


@dataclass(frozen=True, kw_only=True)
class Footage:
    """One stretch of footage: JPEG pictures, their times in seconds, and what is watched for."""

    name: str
    jpegs: Sequence[bytes] = field(repr=False)
    times_s: Sequence[float]
    watches: Sequence[LabelledAlert]

    def __post_init__(self) -> None:
        if len(self.jpegs) != len(self.times_s) or not self.jpegs:
            raise ValueError(
                f"{self.name!r} has {len(self.jpegs)} pictures and {len(self.times_s)} times"
            )
        if any(b <= a for a, b in zip(self.times_s, self.times_s[1:], strict=False)):
            raise ValueError(f"the times of {self.name!r} must rise")


def write_event_set(folder: Path, footage: Iterable[Footage]) -> int:
    """Writes the folder (which must not hold a set yet) and returns the number of events."""
    num_events = 0

    def lines() -> Iterator[tuple[Pictures, dict[str, Any]]]:
        nonlocal num_events
        for part in footage:
            watches = [
                {"question": watch.question, "events": [list(event) for event in watch.events]}
                for watch in part.watches
            ]
            num_events += sum(len(watch.events) for watch in part.watches)
            pictures = Pictures(name=part.name, jpegs=part.jpegs, times_s=part.times_s)
            yield pictures, {"watches": watches}

    SET.write(folder, lines())
    return num_events


def read_event_set(folder: Path) -> Iterator[Footage]:
    """Footage in order. Raises ConfigError naming the line that is wrong or the picture missing."""
    return SET.read(folder, _footage)


def _footage(pictures: Pictures, said: dict[str, Any]) -> Footage:
    watches = [
        LabelledAlert(
            question=str(watch["question"]),
            events=[(float(begin_s), float(end_s)) for begin_s, end_s in watch["events"]],
        )
        for watch in said["watches"]
    ]
    return Footage(
        name=pictures.name, jpegs=pictures.jpegs, times_s=pictures.times_s, watches=watches
    )
