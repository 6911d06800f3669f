"""`edge-vlm demo --street`: the street in real time, and questions whose answers it knows."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from edge_vlm.evaluation.grading import judge
from edge_vlm.formats.qa_set import AskedQuestion
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.world.questions import Question, ask
from edge_vlm.world.street import Street
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.terminal import answer_times
from edge_vlm_runtime.sources.street import StreetCamera, seed_of

SOURCE = "demo:7"
FPS = 2.0
QUESTION_EVERY_S = 3.0
KINDS = ("caption", "count", "presence", "colour", "name", "where")
"""In turn. They are about now, which the demo model can tell at any time of a stream."""


@dataclass
class Score:
    right: int = 0
    asked: int = 0


async def watch_street(url: str, seconds: float, source_text: str = SOURCE) -> Score:
    """Shows the street for so long and prints questions, answers and truth. Raises what the client
    raises."""
    street, rng, score = Street(seed_of(source_text)), random.Random(0), Score()
    async with await Client.connect(url, {"delivery": "live"}) as client:
        camera = StreetCamera(source_text, FPS)
        try:
            frames, next_s = camera.decoded(), QUESTION_EVERY_S
            while (frame := await asyncio.to_thread(next, frames, None)) is not None:
                if frame.time_s > seconds:
                    break
                await client.send_frame(encode_jpeg(frame.rgb()), round(frame.time_s * 1e6))
                await client.wait_processed()
                if frame.time_s < next_s:
                    continue
                question = _question(street, frame.time_s, KINDS[score.asked % len(KINDS)], rng)
                answer = await client.ask(question.text)
                is_right = judge(_graded(question), answer.shown_text).right
                score.asked += 1
                score.right += is_right
                next_s = frame.time_s + QUESTION_EVERY_S
                print(
                    f"  ? {question.text}\n  > {answer.shown_text}   "
                    f"({'right' if is_right else 'wrong'}, truth: {question.answer})"
                    f"{answer_times(answer)}\n",
                    flush=True,
                )
        finally:
            camera.close()
    return score


def _question(street: Street, time_s: float, kind: str, rng: random.Random) -> Question:
    """Of that kind; where it has no clear answer just then, what there is."""
    scenes = street.scenes(time_s, 1)
    question = ask(scenes, 0, kind, 0, rng) or ask(scenes, 0, "caption", 0, rng)
    assert question is not None, "something is always there"
    return question


def _graded(question: Question) -> AskedQuestion:
    return AskedQuestion(
        kind=question.kind, text=question.text, answer=question.answer, frame=question.frame
    )
