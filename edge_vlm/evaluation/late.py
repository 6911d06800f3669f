"""Questions late in a stream: clips that come after a quiet time."""

from __future__ import annotations

import dataclasses
import math

from edge_vlm.formats.qa_set import ClipQuestions
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
        return time_s + quiet_s if time_s else 0.0

    questions = [
        dataclasses.replace(
            question,
            frame=question.frame + count,
            answer=move_times(question.answer, moved),
            also=tuple(move_times(answer, moved) for answer in question.also),
        )
        for question in clip.questions
    ]
    return dataclasses.replace(
        clip,
        jpegs=[clip.jpegs[0]] * count + [*clip.jpegs],
        times_s=[i * STEP_S for i in range(count)] + [time_s + quiet_s for time_s in clip.times_s],
        questions=questions,
        num_quiet=count,
    )
