"""One record of training data: a video and its annotations, as a line of JSON.

The form is documented in docs/training-data.md. Whatever is wrong is a RecordInvalid that names the
place of the record and the field.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, NoReturn

from edge_vlm.errors import RecordInvalid
from edge_vlm.text.prompt import (
    COLUMN,
    FRAME_END,
    FRAME_START,
    IM_END,
    IM_START,
    LOW_RES_START,
    OWN_FRAME_END,
    OWN_FRAME_START,
    PAD,
    PATCH,
    UNUSED_PATCH,
)
from edge_vlm_training.config import msgspec
from edge_vlm_training.data.answers import Place, count_text, points_text

REMEDY = "see docs/training-data.md for the fields of a record"
CAPTION_QUESTION = "Describe this video in detail."
_SPECIAL = (
    *(IM_START, IM_END, FRAME_START, FRAME_END, PATCH, PAD, LOW_RES_START, COLUMN),
    *(OWN_FRAME_START, OWN_FRAME_END, UNUSED_PATCH),
)
"""Would be read as tokens of the prompt's frame if they stood in a text."""

Text = Annotated[str, msgspec.Meta(min_length=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[int, msgspec.Meta(ge=1)]


class Point(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Where an object is at a time: `x`, `y` in 0..1 from the top left; it keeps its `id`."""

    time_s: Seconds
    x: Share
    y: Share
    id: Number = 1


class Annotation(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """What every annotation may have. Each kind has a `turn()` besides: question and answer as
    texts, or ValueError if its fields contradict each other.

    `style` is written before the question (`style: question`), as Molmo2 tells its tasks apart;
    `at_s` lets the question be asked when the clip has been seen up to there. `history` holds
    questions and answers that stand before it and are not learned.
    """

    style: Text | None = None
    at_s: Seconds | None = None
    history: list[tuple[Text, Text]] = msgspec.field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def places(self) -> list[Point]:
        """The points that it holds."""
        return []

    def styled(self, question: str) -> str:
        return question if self.style is None else f"{self.style}: {question}"


class QuestionAnswer(Annotation, tag="qa"):
    question: Text
    answer: Text

    def turn(self) -> tuple[str, str]:
        return self.styled(self.question), self.answer


class Caption(Annotation, tag="caption"):
    caption: Text
    question: Text = CAPTION_QUESTION

    def turn(self) -> tuple[str, str]:
        return self.styled(self.question), self.caption


class CountObjects(Annotation, tag="count"):
    question: Text
    count: Count
    label: Text = "objects"
    points: list[Point] = msgspec.field(default_factory=list)

    @property
    def kind(self) -> str:
        return "count_points" if self.points else "count"

    @property
    def places(self) -> list[Point]:
        return self.points

    def turn(self) -> tuple[str, str]:
        return self.styled(self.question), count_text(self.count, _places(self.points), self.label)


class PointAt(Annotation, tag="point"):
    question: Text
    label: Text
    points: list[Point]

    @property
    def places(self) -> list[Point]:
        return self.points

    def turn(self) -> tuple[str, str]:
        return self.styled(self.question), points_text(_places(self.points), self.label)


KINDS = ("qa", "caption", "count", "count_points", "point")


class Record(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A video file (path from the file that names it), or the stretch of it from `start_s` to
    `end_s`, and its annotations. All their times count from `start_s`."""

    video: Text
    annotations: Annotated[
        list[QuestionAnswer | Caption | CountObjects | PointAt], msgspec.Meta(min_length=1)
    ]
    start_s: Seconds = 0.0
    end_s: Seconds | None = None


_DECODER = msgspec.json.Decoder(Record)
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<field>[^`]*)`)?$", re.DOTALL)


def parse_record(line: str | bytes, where: str) -> Record:
    """A record from its JSON; `where` names its place (file:line) in errors.

    Raises RecordInvalid: not JSON, a field missing, unknown, of a wrong type or out of range, or
    fields that contradict each other.
    """
    try:
        record = _DECODER.decode(line)
    except msgspec.ValidationError as error:
        found = _PATH.match(str(error))
        assert found is not None
        raise RecordInvalid(
            found["what"], where=where, field=found["field"] or "$", remedy=REMEDY
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordInvalid(f"not JSON: {error}", where=where, remedy=REMEDY) from None
    _check(record, where)
    return record


def _check(record: Record, where: str) -> None:
    def wrong(what: str, field: str) -> NoReturn:
        raise RecordInvalid(what, where=where, field=field, remedy=REMEDY)

    length_s = math.inf
    if record.end_s is not None:
        length_s = record.end_s - record.start_s
        if length_s <= 0:
            wrong(f"end_s = {record.end_s} is not behind start_s = {record.start_s}", "$.end_s")
    for i, annotation in enumerate(record.annotations):
        field = f"$.annotations[{i}]"
        try:
            texts = [*annotation.turn(), *itertools.chain(*annotation.history)]
        except ValueError as error:
            wrong(str(error), field)
        for special in _SPECIAL:
            if any(special in text for text in texts):
                wrong(f"a text holds the token {special}", field)
        times = {f"points[{j}].time_s": p.time_s for j, p in enumerate(annotation.places)}
        if annotation.at_s is not None:
            times["at_s"] = annotation.at_s
        for name, time_s in times.items():
            if time_s > length_s:
                wrong(f"{time_s} s lies behind the clip's end", f"{field}.{name}")


def _places(points: list[Point]) -> list[Place]:
    return [Place(point.time_s, point.x, point.y, point.id) for point in points]
