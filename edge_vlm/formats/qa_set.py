"""A folder of short clips with questions and true answers: how stages hand each other a benchmark.

`clips.jsonl` holds one clip a line, `frames/NAME-I.jpg` its pictures::

    {"name": "0007", "times_s": [0.0, 0.5], "questions": [
      {"kind": "where", "text": "Where is the cat now?", "answer": "top left", "frame": 1}]}

A question is asked when the frames up to `frame` have been seen and none later. How an answer is
judged follows from the question (`grading`). One's own videos and questions are easier to
write down as one JSONL file (`edge_vlm.evaluation.qa_jsonl`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.formats.picture_index import PictureIndex, Pictures
from edge_vlm.json_text import MALFORMED, parse_json

INDEX = "clips.jsonl"
SET = PictureIndex(
    file=INDEX,
    kind="question set",
    part="clip",
    made_by="edge-vlm world --out FOLDER",
)

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
    asked = 0

    def lines() -> Iterator[tuple[Pictures, dict[str, Any]]]:
        nonlocal asked
        for clip in clips:
            asked += len(clip.questions)
            pictures = Pictures(name=clip.name, jpegs=clip.jpegs, times_s=clip.times_s)
            yield pictures, {"questions": [asdict(question) for question in clip.questions]}

    SET.write(folder, lines())
    return asked


def num_questions(folder: Path) -> Iterator[int]:
    """Of each clip, from the index alone; a bad line counts as 0, `read_question_set` names it."""
    for _, line in SET.lines(folder):
        try:
            yield len(parse_json(line)["questions"])
        except MALFORMED:
            yield 0


def read_question_set(folder: Path) -> Iterator[ClipQuestions]:
    """Clips in order. Raises ConfigError naming the line that is wrong or the picture missing."""
    return SET.read(folder, _clip)


def _clip(pictures: Pictures, said: dict[str, Any]) -> ClipQuestions:
    questions = [_question(fields) for fields in said["questions"]]
    return ClipQuestions(
        name=pictures.name, jpegs=pictures.jpegs, times_s=pictures.times_s, questions=questions
    )


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
