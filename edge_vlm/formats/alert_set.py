"""A folder of footage with yes/no questions and the times at which each is true: how stages hand
each other what alerts are measured on.

`footage.jsonl` holds one stretch of footage a line, `frames/NAME-I.jpg` its pictures::

    {"name": "0007", "times_s": [0.0, 0.5, 1.0], "watches": [
      {"question": "Is there a cat now?", "events": [[0.5, 1.5]]}]}

An event is true from its first time on, and no more at its second one. Write such a folder to
measure on footage of your own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, numbered_lines, parse_json

INDEX = "footage.jsonl"


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
    pictures = folder / "frames"
    if (folder / INDEX).exists():
        raise ConfigError("there is an event set already", where=folder, remedy="name a new one")
    pictures.mkdir(parents=True, exist_ok=True)
    num_events = 0
    with open(folder / INDEX, "w") as index:
        for part in footage:
            for i, jpeg in enumerate(part.jpegs):
                (pictures / f"{part.name}-{i}.jpg").write_bytes(jpeg)
            watches = [
                {"question": watch.question, "events": [list(event) for event in watch.events]}
                for watch in part.watches
            ]
            line = {"name": part.name, "times_s": list(part.times_s), "watches": watches}
            index.write(json.dumps(line) + "\n")
            num_events += sum(len(watch.events) for watch in part.watches)
    return num_events


def read_event_set(folder: Path) -> Iterator[Footage]:
    """Footage in order. Raises ConfigError naming the line that is wrong or the picture missing."""
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(
            f"no event set: {INDEX} is missing",
            where=folder,
            remedy="make one with `edge-vlm world --events 40 --out FOLDER`",
        )
    for number, line in _lines(index):
        try:
            data: dict[str, Any] = parse_json(line)
            name, times_s = str(data["name"]), [float(t) for t in data["times_s"]]
            watches = [
                LabelledAlert(
                    question=str(watch["question"]),
                    events=[(float(begin_s), float(end_s)) for begin_s, end_s in watch["events"]],
                )
                for watch in data["watches"]
            ]
            paths = [folder / "frames" / f"{name}-{i}.jpg" for i in range(len(times_s))]
            jpegs = [path.read_bytes() for path in paths]
            yield Footage(name=name, jpegs=jpegs, times_s=times_s, watches=watches)
        except (OSError, *MALFORMED) as error:
            raise ConfigError(
                f"bad footage: {error!r}", where=f"{index}:{number}", remedy="write the set anew"
            ) from error


def _lines(index: Path) -> list[tuple[int, str]]:
    """Raises ConfigError."""
    try:
        return numbered_lines(index)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=index, remedy="write the set anew"
        ) from error
