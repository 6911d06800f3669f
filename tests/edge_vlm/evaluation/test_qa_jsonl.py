"""Questions about one's own videos."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.errors import ConfigError, VideoNotFound, VideoUnreadable
from edge_vlm.evaluation.qa_jsonl import read_question_file, read_questions
from edge_vlm.formats.qa_set import (
    AskedQuestion,
    ClipQuestions,
    read_question_set,
    write_question_set,
)
from tests.runtime.cameras.pictures import write_video

GOOD: dict[str, Any] = {"video": "a.mp4", "question": "How many?", "answer": "2"}


def write(folder: Path, *records: object) -> Path:
    path = folder / "questions.jsonl"
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", 12, fps=4)
    return tmp_path


def test_lines_about_one_video_are_one_clip(folder: Path) -> None:
    early = GOOD | {"at_s": 1.0, "kind": "count", "answer": ["2", "two"]}
    pointing = GOOD | {"at_s": 0, "boxes": [[0.5, 0.5, 0.2, 0.1]]}
    (clip,) = read_questions(write(folder, GOOD, "", early, pointing))
    assert clip.times_s == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert [question.frame for question in clip.questions] == [5, 2, 0]
    assert [question.kind for question in clip.questions] == ["question", "count", "question"]
    assert clip.questions[1].also == ("two",)
    assert clip.questions[2].boxes == ((0.5, 0.5, 0.2, 0.1),)


def test_a_file_of_an_editor_that_writes_a_byte_order_mark(folder: Path) -> None:
    path = write(folder, GOOD)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    (question,) = read_question_file(path)
    assert question.text == GOOD["question"]


def test_a_question_set_with_a_byte_order_mark(tmp_path: Path) -> None:
    asked = AskedQuestion(kind="q", text="How many?", answer="2", frame=0)
    clip = ClipQuestions(name="a", jpegs=[b"picture"], times_s=[0.0], questions=[asked])
    write_question_set(tmp_path, [clip])
    index = tmp_path / "clips.jsonl"
    index.write_bytes(codecs.BOM_UTF8 + index.read_bytes())
    assert list(read_question_set(tmp_path)) == [clip]


def test_a_rate_of_ones_own(folder: Path) -> None:
    (clip,) = read_questions(write(folder, GOOD), fps=1.0)
    assert clip.times_s == pytest.approx([0, 1, 2])


def test_a_question_behind_what_is_read_is_an_error(folder: Path) -> None:
    path = write(folder, GOOD | {"at_s": 0.5}, GOOD)
    with pytest.raises(ConfigError, match="after the first 3 frames") as caught:
        list(read_questions(path, max_frames=3))
    assert str(caught.value.where) == f"{path}:2"
    (clip,) = read_questions(write(folder, GOOD | {"at_s": 0.5}), max_frames=3)
    assert len(clip.jpegs) == 3


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ("nonsense", "Expecting value"),
        ("[1]", "expected an object"),
        (GOOD | {"vidoe": "a"}, "unknown field 'vidoe'"),
        ({"video": "a.mp4", "question": "?"}, "answer must be"),
        (GOOD | {"answer": []}, "answer must be"),
        (GOOD | {"answer": 2}, "answer must be"),
        (GOOD | {"question": " "}, "question must be a text"),
        (GOOD | {"video": None}, "video must be a text"),
        (GOOD | {"kind": 3}, "kind must be a text"),
        (GOOD | {"at_s": -1}, "at_s must be"),
        (GOOD | {"at_s": "3"}, "at_s must be"),
        (GOOD | {"at_s": float("nan")}, "at_s must be"),
        (GOOD | {"boxes": [[0.5, 0.5, 3, 0.1]]}, "a box is"),
        (GOOD | {"boxes": [[0.5, 0.5]]}, "not enough values"),
        (GOOD | {"boxes": 7}, "not iterable"),
    ],
)
def test_a_bad_line_is_named(folder: Path, record: object, what: str) -> None:
    path = write(folder, GOOD, record)
    with pytest.raises(ConfigError, match=what) as caught:
        read_question_file(path)
    assert caught.value.where == f"{path}:2"


def test_an_absent_video_is_named_before_any_is_read(folder: Path) -> None:
    path = write(folder, GOOD, GOOD | {"video": "b.mp4"})
    with pytest.raises(VideoNotFound, match=r"b\.mp4") as caught:
        next(read_questions(path))
    assert caught.value.where == f"{path}:2"


def test_what_is_no_video_is_an_error(folder: Path) -> None:
    (folder / "b.mp4").write_text("hello")
    with pytest.raises(VideoUnreadable):
        list(read_questions(write(folder, GOOD | {"video": "b.mp4"})))


def test_an_empty_file_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no question"):
        read_question_file(write(folder, ""))


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_question_file(tmp_path / "no.jsonl")
