"""Questions about one's own videos: a JSONL file, one question a line.

    {"video": "clips/door.mp4", "question": "How many people are there?", "answer": "2"}

- `video`: path of a video file, from the JSONL file's folder;
- `question`: its text;
- `answer`: the true answer, or a list of wordings of it;
- `kind`: what it counts under in the table (default `question`); a `caption` is judged by facts;
- `at_s`: asked when the video has been seen up to here (default: to its end);
- `boxes`: where the things are that are to be pointed to, each centre x, centre y, width and height
  in shares of the picture.

Lines about the same video become one clip. Empty lines are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError, VideoEmpty, VideoNotFound
from edge_vlm.formats.qa_set import (
    AskedQuestion,
    Box,
    ClipQuestions,
    boxes_of,
    num_questions,
    read_question_set,
)
from edge_vlm.json_text import MALFORMED, numbered_lines, parse_json
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import read_clip, read_video

FIELDS = ("video", "question", "answer", "kind", "at_s", "boxes")
DEFAULT_KIND = "question"
EPSILON_S = 1e-3


@dataclass(frozen=True, kw_only=True)
class FileQuestion:
    """One line of the file. `line` counts from 1."""

    line: int
    video: Path
    text: str
    answers: tuple[str, ...]
    kind: str
    at_s: float | None
    boxes: tuple[Box, ...] | None


def read_questions(
    path: Path, fps: float = 2.0, max_frames: int = 64, rule: FrameRule | None = None
) -> Iterator[ClipQuestions]:
    """Clips of a question-set folder, or of a JSONL file with its videos by `rule`, or without one
    as a stream of `fps` that is `max_frames` long.

    Raises ConfigError naming the line that is wrong (all lines are checked before the first video
    is read), VideoNotFound, VideoUnreadable, VideoEmpty, and ConfigError for a question that lies
    after the first `max_frames` frames.
    """
    if path.is_dir():
        yield from read_question_set(path)
        return
    by_video: dict[Path, list[FileQuestion]] = {}
    for question in read_question_file(path):
        by_video.setdefault(question.video, []).append(question)
    for number, (video, questions) in enumerate(by_video.items(), start=1):
        yield _clip(f"{number:04d}-{video.stem}", path, video, questions, fps, max_frames, rule)


def count_questions(path: Path, most_clips: int | None = None) -> tuple[int, int]:
    """How many clips and questions `read_questions` gives, of the first `most_clips`; reads no
    picture. Raises ConfigError, VideoNotFound."""
    per_clip: list[int] = []
    if path.is_dir():
        per_clip = list(num_questions(path))
    else:
        by_video: dict[Path, int] = {}
        for question in read_question_file(path):
            by_video[question.video] = by_video.get(question.video, 0) + 1
        per_clip = list(by_video.values())
    counted = per_clip[:most_clips]
    return len(counted), sum(counted)


def read_question_file(path: Path) -> list[FileQuestion]:
    """Every line. Raises ConfigError naming the first that is wrong, VideoNotFound."""
    try:
        lines = numbered_lines(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the questions cannot be read: {error}", where=path) from error
    questions = []
    for number, line in lines:
        try:
            questions.append(_question(path, number, parse_json(line)))
        except MALFORMED as error:
            raise ConfigError(
                f"bad question: {error}",
                where=f"{path}:{number}",
                remedy='write {"video": ..., "question": ..., "answer": ...}',
            ) from None
    if not questions:
        raise ConfigError("there is no question in it", where=path)
    for question in questions:
        if not _is_file(question.video):
            raise VideoNotFound(f"no such video: {question.video}", where=f"{path}:{question.line}")
    return questions


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no file can have such a name
        return False


def _question(path: Path, number: int, record: Any) -> FileQuestion:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}, known are {', '.join(FIELDS)}")
    answer = record.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"answer must be a text or a list of texts, got {answer!r}")
    at_s = record.get("at_s")
    if at_s is not None and not (_is_number(at_s) and 0 <= at_s < math.inf):
        raise ValueError(f"at_s must be seconds from the video's begin, got {at_s!r}")
    question = AskedQuestion(  # checks the boxes
        kind=_text(record.get("kind", DEFAULT_KIND), "kind"),
        text=_text(record.get("question"), "question"),
        answer=_text(answers[0], "answer"),
        also=tuple(_text(other, "answer") for other in answers[1:]),
        boxes=boxes_of(record.get("boxes")),
        frame=0,
    )
    return FileQuestion(
        line=number,
        video=path.parent / _text(record.get("video"), "video"),
        text=question.text,
        answers=(question.answer, *question.also),
        kind=question.kind,
        at_s=None if at_s is None else float(at_s),
        boxes=question.boxes,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} must be a text, got {value!r}")
    return value


def _clip(
    name: str,
    path: Path,
    video: Path,
    questions: list[FileQuestion],
    fps: float,
    max_frames: int,
    rule: FrameRule | None,
) -> ClipQuestions:
    times_s: list[float] = []
    jpegs: list[bytes] = []
    is_longer = False
    for time_s, rgb in read_video(video, fps) if rule is None else read_clip(video, rule):
        if rule is None and len(jpegs) == max_frames:
            is_longer = True
            break
        times_s.append(time_s)
        jpegs.append(encode_jpeg(rgb))
    if not jpegs:
        raise VideoEmpty("there is no frame in it", where=video)
    asked = []
    for question in questions:
        if is_longer and (question.at_s is None or question.at_s >= times_s[-1] + 1 / fps):
            raise ConfigError(
                f"the question comes after the first {max_frames} frames of {video}",
                where=f"{path}:{question.line}",
                remedy="raise --max-frames, lower --fps, or set at_s",
            )
        at_s = math.inf if question.at_s is None else question.at_s
        seen = sum(time_s <= at_s + EPSILON_S for time_s in times_s)
        asked.append(
            AskedQuestion(
                kind=question.kind,
                text=question.text,
                answer=question.answers[0],
                also=question.answers[1:],
                boxes=question.boxes,
                frame=max(seen, 1) - 1,
            )
        )
    return ClipQuestions(name=name, jpegs=jpegs, times_s=times_s, questions=asked)
