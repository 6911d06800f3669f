"""A folder of JPEGs behind an index of JSON lines, as question sets and event sets are kept.

A line of the index has `name` and `times_s` of some pictures, which lie in `frames/NAME-I.jpg`, and
what else is said of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, fault_of, numbered_lines, parse_json

REMEDY = "write the set anew"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Of one line: JPEG files and their times in seconds."""

    name: str
    jpegs: Sequence[bytes]
    times_s: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class PictureIndex:
    """One kind of such a folder."""

    file: str
    kind: str
    part: str
    """What a line holds."""
    made_by: str

    def write(self, folder: Path, lines: Iterable[tuple[Pictures, dict[str, Any]]]) -> None:
        """Writes a folder that must not hold one yet: ConfigError."""
        if (folder / self.file).exists():
            raise ConfigError(
                f"{self.file} is there already", where=folder, remedy="name a new folder"
            )
        (folder / "frames").mkdir(parents=True, exist_ok=True)
        with open(folder / self.file, "w") as index:
            for pictures, said in lines:
                for path, jpeg in zip(_paths(folder, pictures), pictures.jpegs, strict=True):
                    path.write_bytes(jpeg)
                line = {"name": pictures.name, "times_s": list(pictures.times_s), **said}
                index.write(json.dumps(line) + "\n")

    def read(self, folder: Path, make: Callable[[Pictures, dict[str, Any]], T]) -> Iterator[T]:
        """What `make` makes of each line, in order. Raises ConfigError naming the line that is
        wrong or the picture that is missing."""
        index = folder / self.file
        if not index.is_file():
            raise ConfigError(
                f"no {self.kind}: {self.file} is missing",
                where=folder,
                remedy=f"make one with `{self.made_by}`",
            )
        for number, line in self.lines(folder):
            try:
                said: dict[str, Any] = parse_json(line)
                times_s = [float(time_s) for time_s in said["times_s"]]
                pictures = Pictures(name=str(said["name"]), jpegs=(), times_s=times_s)
                jpegs = [path.read_bytes() for path in _paths(folder, pictures)]
                made = make(Pictures(name=pictures.name, jpegs=jpegs, times_s=times_s), said)
            except (OSError, *MALFORMED) as error:
                where = f"{index}:{number}"
                raise ConfigError(
                    f"bad {self.part}: {fault_of(error)}", where=where, remedy=REMEDY
                ) from error
            yield made

    def lines(self, folder: Path) -> list[tuple[int, str]]:
        """Those that say something, counted from 1. Raises ConfigError."""
        index = folder / self.file
        try:
            return numbered_lines(index)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot be read: {error}", where=index, remedy=REMEDY) from error


def _paths(folder: Path, pictures: Pictures) -> list[Path]:
    return [folder / "frames" / f"{pictures.name}-{i}.jpg" for i in range(len(pictures.times_s))]
