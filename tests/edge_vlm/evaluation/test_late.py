"""Clips after a quiet time: what is right of their begin is not right half an hour later."""

from __future__ import annotations

import pytest

from edge_vlm.evaluation.late import after_quiet
from edge_vlm.formats.qa_set import AskedQuestion, ClipQuestions


@pytest.mark.parametrize(
    ("answer", "also", "right"),
    [
        ("at 0.0 s", ["at 0.5 s"], {"at 0.0 s", "at 0.5 s"}),
        ("at 0.5 s", ["at 0.0 s", "at 1.0 s"], {"at 1800.5 s", "at 1800.0 s", "at 1801.0 s"}),
        ("at 3.0 s", ["at 2.5 s"], {"at 1803.0 s", "at 1802.5 s"}),
        ("red", ["crimson"], {"red", "crimson"}),
    ],
)
def test_answers_move_with_what_they_speak_of(
    answer: str, also: list[str], right: set[str]
) -> None:
    question = AskedQuestion(
        kind="when", text="When did the cat appear?", answer=answer, frame=1, also=tuple(also)
    )
    clip = ClipQuestions(name="c", jpegs=[b"a", b"b"], times_s=[0.0, 0.5], questions=[question])
    late = after_quiet(clip, 1800.0)
    (moved,) = late.questions
    assert {moved.answer, *moved.also} == right
    assert late.times_s[moved.frame] == 1800.5
    assert late.jpegs[moved.frame] == b"b"
