"""Answers on disk: what was answered is never asked again, and never mixed up."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.log import AnswerLog
from edge_vlm.evaluation.runs import ClipAnswers

MEASURED = {"questions": "abc", "torch": "def"}
KEY = ("torch", "stream:0.5:frame", "0001")
ANSWERS = ClipAnswers(["yes", "top left"], 128, 64)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    log = AnswerLog(tmp_path / "run" / "answers.jsonl", MEASURED)
    log.add(KEY, ANSWERS)
    log.close()
    return tmp_path / "run" / "answers.jsonl"


def test_what_was_answered_is_there_again(file: Path) -> None:
    with closing(AnswerLog(file, MEASURED)) as log:
        assert KEY in log
        assert ("torch", "stream:0.5:frame", "0002") not in log
        assert log[KEY] == ANSWERS
        assert len(log) == 1


def test_a_line_that_was_cut_off_is_taken_off(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole + whole.splitlines(keepends=True)[-1][:-9])
    second = ("torch", "stream:0.5:frame", "0002")
    with closing(AnswerLog(file, MEASURED)) as log:
        assert len(log) == 1
        log.add(second, ANSWERS)
    with closing(AnswerLog(file, MEASURED)) as log:
        assert second in log


@pytest.mark.parametrize("name", MEASURED)
def test_other_questions_and_other_models_are_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"given with different {name}"):
        AnswerLog(file, MEASURED | {name: "other"})
    with closing(AnswerLog(file, MEASURED)) as log:
        assert len(log) == 1


def test_another_path_may_join_and_then_stays(file: Path) -> None:
    AnswerLog(file, {"questions": "abc", "served": "ghi"}).close()
    with pytest.raises(ConfigError, match="given with different served"):
        AnswerLog(file, {"questions": "abc", "served": "other"})
    with closing(AnswerLog(file, MEASURED)) as log:
        assert KEY in log


@pytest.mark.parametrize("content", ["hello\n", "{}\n", '{"format": 99, "measured": {}}\n'])
def test_another_file_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match="not a log of answers"):
        AnswerLog(file, MEASURED)
    assert file.read_text() == content


def test_without_a_file_it_remembers() -> None:
    log = AnswerLog(None, MEASURED)
    log.add(KEY, ANSWERS)
    assert log[KEY] == ANSWERS


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be kept there"):
        AnswerLog(tmp_path / "run" / "answers.jsonl", MEASURED)


def test_logs_may_be_joined_end_to_end(file: Path, tmp_path: Path) -> None:
    other = AnswerLog(tmp_path / "b.jsonl", {"questions": "abc", "served": "ghi"})
    served = ("served", "stream:0.5:frame", "0001")
    other.add(served, ANSWERS)
    other.close()
    file.write_bytes(file.read_bytes() + (tmp_path / "b.jsonl").read_bytes())
    with closing(AnswerLog(file, MEASURED | {"served": "ghi"})) as log:
        assert KEY in log
        assert served in log
    with pytest.raises(ConfigError, match="given with different served"):
        AnswerLog(file, {"served": "other"})
