"""A folder of short clips with questions and true answers: how stages hand each other a benchmark.

`clips.jsonl` holds one clip a line, `frames/NAME-I.jpg` its pictures::

    {"name": "0007", "times_s": [0.0, 0.5], "questions": [
      {"kind": "where", "text": "Where is the cat now?", "answer": "top left", "frame": 1}]}

A question is asked when the frames up to `frame` have been seen and none later. How an answer is
judged follows from the question (`grading`). One's own videos and questions are easier to
write down as one JSONL file (`edge_vlm.evaluation.qa_jsonl`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, numbered_lines, parse_json

INDEX = "clips.jsonl"

Box = tuple[float, float, float, float]
"""Centre x, centre y, width, height in shares of the picture."""


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """One question with its true answer."""

    kind: str
    text: str
    answer: str
    frame: int
    also: tuple[str, ...] = ()
    """Other wordings of the answer that are right too."""
    boxes: tuple[Box, ...] | None = None
    """Where the things are that the answer points to."""

    def __post_init__(self) -> None:
        for box in self.boxes or ():
            if len(box) != 4 or not all(0 <= value <= 1 for value in box):
                raise ValueError(
                    f"a box is centre x, centre y, width and height in 0..1, got {list(box)}"
                )


@dataclass(frozen=True, kw_only=True)
class ClipQuestions:
    """One clip: JPEG pictures, their times in seconds, and what is asked about them."""

    name: str
    jpegs: Sequence[bytes] = field(repr=False)
    times_s: Sequence[float]
    questions: Sequence[AskedQuestion]
    num_quiet: int = 0
    """Pictures at the begin that only repeat the clip's first one; see `evaluation.late`."""

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


def num_questions(folder: Path) -> Iterator[int]:
    """Of each clip, from the index alone; a bad line counts as 0, `read_question_set` names it."""
    for _, line in _lines(folder / INDEX):
        try:
            yield len(parse_json(line)["questions"])
        except MALFORMED:
            yield 0


def read_question_set(folder: Path) -> Iterator[ClipQuestions]:
    """Clips in order. Raises ConfigError naming the line that is wrong or the picture missing."""
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(
            f"no question set: {INDEX} is missing",
            where=folder,
            remedy="make one with `edge-vlm world --out FOLDER`",
        )
    for number, line in _lines(index):
        try:
            data: dict[str, Any] = parse_json(line)
            name, times_s = str(data["name"]), [float(t) for t in data["times_s"]]
            questions = [_question(fields) for fields in data["questions"]]
            paths = [folder / "frames" / f"{name}-{i}.jpg" for i in range(len(times_s))]
            jpegs = [path.read_bytes() for path in paths]
            yield ClipQuestions(name=name, jpegs=jpegs, times_s=times_s, questions=questions)
        except (OSError, *MALFORMED) as error:
            raise ConfigError(
                f"bad clip: {error!r}", where=f"{index}:{number}", remedy="write the set anew"
            ) from error


def _lines(index: Path) -> list[tuple[int, str]]:
    """Raises ConfigError."""
    try:
        return numbered_lines(index)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=index, remedy="write the set anew"
        ) from error


def _question(fields: dict[str, Any]) -> AskedQuestion:
    fields = dict(fields)
    square = fields.pop("box", None)  # sets written earlier: centre x, centre y, side
    boxes = fields.pop("boxes", None)
    if boxes is None and square is not None:
        boxes = [[*square, square[-1]]]
    also = tuple(str(text) for text in fields.pop("also", ()))
    return AskedQuestion(**fields, also=also, boxes=boxes_of(boxes))


def boxes_of(values: Any) -> tuple[Box, ...] | None:
    """JSON's lists of numbers as boxes. Raises TypeError and ValueError."""
    if values is None:
        return None
    return tuple((float(x), float(y), float(w), float(h)) for x, y, w, h in values)
