"""Questions late in a stream: clips that come after a quiet time."""

from __future__ import annotations

import dataclasses
import math

from edge_vlm.formats.qa_set import AskedQuestion, ClipQuestions
from edge_vlm.text.times import move_times

STEP_S = 1.0
"""Between the pictures of the quiet time."""


def after_quiet(clip: ClipQuestions, quiet_s: float) -> ClipQuestions:
    """The clip after its first picture has been shown for `quiet_s` seconds.

    The true answers move along: what happened at 1.5 s now happens at `quiet_s` + 1.5 s. What was
    there from the begin, at 0.0 s, still is.
    """
    count = math.ceil(quiet_s / STEP_S)

    def moved(time_s: float) -> float:
        return time_s + quiet_s

    def later(question: AskedQuestion) -> AskedQuestion:
        frame = question.frame + count
        # What was there from the begin: its neighbours stay with it, half an hour later is wrong.
        if question.answer == move_times(question.answer, lambda time_s: 0.0):
            return dataclasses.replace(question, frame=frame)
        answer, *also = (move_times(text, moved) for text in (question.answer, *question.also))
        return dataclasses.replace(question, frame=frame, answer=answer, also=tuple(also))

    return dataclasses.replace(
        clip,
        jpegs=[clip.jpegs[0]] * count + [*clip.jpegs],
        times_s=[i * STEP_S for i in range(count)] + [time_s + quiet_s for time_s in clip.times_s],
        questions=[later(question) for question in clip.questions],
        num_quiet=count,
    )
