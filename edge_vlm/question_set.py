"""A folder of short clips with questions and true answers: how stages hand each other a benchmark.

`clips.jsonl` holds one clip a line, `frames/NAME-I.jpg` its pictures::

    {"name": "0007", "times_s": [0.0, 0.5], "questions": [
      {"kind": "where", "text": "Where is the cat now?", "answer": "top left", "frame": 1}]}

A question is asked when the frames up to `frame` have been seen and none later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError

INDEX = "clips.jsonl"


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """One question with its exact answer; `box` is where a pointed-at thing is.

    `box` is (centre x, centre y, side) in shares of the picture.
    """

    kind: str
    text: str
    answer: str
    frame: int
    box: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ClipQuestions:
    """One clip: JPEG pictures, their times in seconds, and what is asked about them."""

    name: str
    jpegs: Sequence[bytes] = field(repr=False)
    times_s: Sequence[float]
    questions: Sequence[AskedQuestion]

    def __post_init__(self) -> None:
        if len(self.jpegs) != len(self.times_s) or not self.jpegs:
            raise ValueError(
                f"clip {self.name!r} has {len(self.jpegs)} pictures and {len(self.times_s)} times"
            )
        for question in self.questions:
            if not 0 <= question.frame < len(self.jpegs):
                raise ValueError(f"clip {self.name!r} asks after frame {question.frame}")


def write_question_set(folder: Path, clips: Iterable[ClipQuestions]) -> int:
    """Writes the folder (which must not hold a set yet) and returns the number of questions."""
    pictures = folder / "frames"
    if (folder / INDEX).exists():
        raise ConfigError("there is a question set already", where=folder, remedy="name a new one")
    pictures.mkdir(parents=True, exist_ok=True)
    asked = 0
    with open(folder / INDEX, "w") as index:
        for clip in clips:
            for i, jpeg in enumerate(clip.jpegs):
                (pictures / f"{clip.name}-{i}.jpg").write_bytes(jpeg)
            questions = [asdict(question) for question in clip.questions]
            line = {"name": clip.name, "times_s": list(clip.times_s), "questions": questions}
            index.write(json.dumps(line) + "\n")
            asked += len(questions)
    return asked


def read_question_set(folder: Path) -> Iterator[ClipQuestions]:
    """Clips in order. Raises ConfigError naming the line that is wrong or the picture missing."""
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(
            f"no question set: {INDEX} is missing",
            where=folder,
            remedy="make one with `edge-vlm world --out FOLDER`",
        )
    for number, line in enumerate(index.read_text().splitlines(), start=1):
        try:
            data: dict[str, Any] = json.loads(line)
            name, times_s = str(data["name"]), [float(t) for t in data["times_s"]]
            questions = [
                AskedQuestion(**q | {"box": tuple(q["box"]) if q.get("box") else None})
                for q in data["questions"]
            ]
            paths = [folder / "frames" / f"{name}-{i}.jpg" for i in range(len(times_s))]
            jpegs = [path.read_bytes() for path in paths]
            yield ClipQuestions(name=name, jpegs=jpegs, times_s=times_s, questions=questions)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise ConfigError(
                f"bad clip: {error!r}", where=f"{index}:{number}", remedy="write the set anew"
            ) from error
