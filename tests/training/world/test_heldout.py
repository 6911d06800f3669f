"""Held-out questions: extra kinds change no others, and are true."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from edge_vlm.cli import main
from edge_vlm.evaluation.grading import judge
from edge_vlm.formats.qa_set import (
    AskedQuestion,
    ClipQuestions,
    read_question_set,
    write_question_set,
)
from edge_vlm.text.points import parse_points
from edge_vlm.world.questions import QUESTION_KINDS, vocabulary
from edge_vlm_training.world.heldout import ALERT, BENCHMARK_KINDS, heldout_clips
from edge_vlm_training.world.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def clips() -> list[ClipQuestions]:
    return list(islice(heldout_clips(5, 1000, kinds=BENCHMARK_KINDS, per_clip=2), 6))


def of_kind(clips: list[ClipQuestions], *kinds: str) -> list[AskedQuestion]:
    return [question for clip in clips for question in clip.questions if question.kind in kinds]


def test_alerts_change_no_others(clips: list[ClipQuestions]) -> None:
    plain = list(islice(heldout_clips(5, 1000, per_clip=2), 6))
    assert of_kind(clips, *QUESTION_KINDS) == of_kind(plain, *QUESTION_KINDS)
    assert [clip.jpegs for clip in clips] == [clip.jpegs for clip in plain]


def test_an_alert_is_asked_behind_every_frame(clips: list[ClipQuestions]) -> None:
    for clip in clips:
        asked = of_kind([clip], ALERT)
        assert [question.frame for question in asked] == list(range(len(clip.jpegs)))
        assert len({question.text for question in asked}) == 1
    assert {question.answer for question in of_kind(clips, ALERT)} == {"yes", "no"}


def test_alerts_agree_with_presence_and_captions_with_counts() -> None:
    compared = 0
    for clip in islice(heldout_clips(6, 1000, kinds=("count", "caption"), per_clip=8), 6):
        by_frame = {q.frame: int(q.answer) for q in of_kind([clip], "count")}
        for caption in of_kind([clip], "caption"):
            assert judge(caption, caption.answer).right
            if caption.frame in by_frame:
                compared += 1
                assert judge(caption, caption.answer).true == by_frame[caption.frame]
    assert compared


def test_true_answers_are_right_and_points_lie_in_their_boxes(clips: list[ClipQuestions]) -> None:
    asked = of_kind(clips, *BENCHMARK_KINDS)
    assert {question.kind for question in asked} == set(BENCHMARK_KINDS)
    assert all(judge(question, question.answer).right for question in asked)
    assert all(
        len(parse_points(q.answer)) == len(q.boxes or ()) == 1 for q in of_kind(clips, "point")
    )


def test_event_times_are_right_within_one_frame_interval() -> None:
    asked = of_kind(list(heldout_clips(8, 40, kinds=("when",), per_clip=3)), "when")
    for question in asked:
        _, said, unit = question.answer.split()
        for offset, right in ((0.0, True), (0.5, True), (-0.5, True), (1.0, False), (-1.0, False)):
            moved = float(said) + offset
            if 0 <= moved <= 7.5:
                assert judge(question, f"at {moved:.1f} {unit}").right is right
    assert len({question.answer for question in asked}) > 6


def test_at_most_as_many_of_a_kind_as_wanted() -> None:
    clips = list(heldout_clips(7, 3, kinds=("name", ALERT), per_clip=2))
    assert len(of_kind(clips, "name")) == len(of_kind(clips, ALERT)) == 3
    assert all(len(of_kind([clip], "name")) <= 2 for clip in clips)


def test_no_question_needs_a_word_that_training_lacks(
    clips: list[ClipQuestions], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from edge_vlm.text.tokenizer import Tokenizer

    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    build_tokenizer(vocabulary(), file)
    tokenizer = Tokenizer.from_file(file)
    unknown = tokenizer.id_of("<unk>")
    for question in of_kind(clips, *BENCHMARK_KINDS):
        assert unknown not in tokenizer.encode(question.text)
        assert unknown not in tokenizer.encode(question.answer)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kinds of question: smell"):
        next(heldout_clips(1, 1, kinds=("smell",)))


def test_a_set_is_read_as_it_was_written(
    clips: list[ClipQuestions], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("set")
    write_question_set(folder, clips)
    assert list(read_question_set(folder)) == clips


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--harder", "--events", "2"), "--harder is of questions"),
        (("--harder", "--demo-clip"), "--harder is of questions"),
        (("--seed", "-1"), "--seed must be"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["world", "-o", str(tmp_path / "clips"), *options]) == 2
    assert words in capsys.readouterr().err
