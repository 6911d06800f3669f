"""Held-out clips of the rendered world as files: the benchmark set and the demo clip."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge_vlm.formats.qa_set import AskedQuestion, ClipQuestions
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.video import write_video
from edge_vlm.world.harder import harder
from edge_vlm.world.questions import (
    ABSENT,
    QUESTION_KINDS,
    Question,
    ask,
    ask_sometime,
    event_time,
)
from edge_vlm.world.scenes import Scenes, WorldConfig
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.world.render import draw_batch

PICTURE_SIZE = 192
"""Pixels a side of what is sent: twice the model's, so that JPEG's coarse colour is harmless."""
_WATCHED_SHARE = 2 / 3
_FULL_SHARE = 1 / 3
"""Of clips that have as many things as a clip can; four and five at once are rare in the others."""


ALERT = "alert"
"""A kind that is only asked, never trained on as such. It needs no word that training lacks."""
BENCHMARK_KINDS = (*QUESTION_KINDS, ALERT)
ASKED_KINDS = (*BENCHMARK_KINDS, ABSENT)
BENCHMARK_PER_CLIP = 3


def heldout_clips(
    seed: int,
    per_kind: int,
    num_frames: int = 16,
    *,
    kinds: Sequence[str] = QUESTION_KINDS,
    per_clip: int = 1,
    is_harder: bool = False,
) -> Iterator[ClipQuestions]:
    """Clips until every kind of question has `per_kind` questions, `per_clip` of a kind in a clip.

    `is_harder`: of the harder world. `alert` asks "Is there a ... now?" about one thing behind
    every frame of a clip. Raises ValueError for other kinds than ASKED_KINDS.
    """
    unknown = set(kinds) - set(ASKED_KINDS)
    if unknown:
        raise ValueError(f"unknown kinds of question: {', '.join(sorted(unknown))}")
    rng, other_rng = random.Random(seed), random.Random(~seed)  # alerts change no others
    world = WorldConfig(
        num_frames=num_frames,
        split="heldout",
        start_at_zero=1.0,  # as a session does
        crowded=_FULL_SHARE,
    )
    if is_harder:
        world = harder(world)
    missing = dict.fromkeys(kinds, per_kind)
    number = 0
    while any(left > 0 for left in missing.values()):
        frames, scenes = draw_batch(seed * 100_003 + number, 1, world, PICTURE_SIZE)
        questions: list[AskedQuestion] = []
        for kind in (kind for kind, left in missing.items() if left > 0):
            if kind == ALERT:
                found = _alert(scenes, other_rng)
            else:
                tries = (ask_sometime(scenes, 0, kind, rng) for _ in range(per_clip))
                found = [_asked(question, scenes) for question in tries if question is not None]
            found = list(dict.fromkeys(found))[: missing[kind]]
            missing[kind] -= len(found)
            questions += found
        number += 1
        if questions:
            yield ClipQuestions(
                name=f"{number:05d}",
                jpegs=[encode_jpeg(picture) for picture in frames[0].numpy()],
                times_s=scenes.times_s[0].tolist(),
                questions=sorted(questions, key=lambda q: q.frame),
            )


def _asked(question: Question, scenes: Scenes) -> AskedQuestion:
    boxes = None
    also: tuple[str, ...] = ()
    if question.kind == "when":  # right within one frame interval
        times, first = scenes.times_s[0], question.meta["first"]
        near = (t for t in (first - 1, first + 1) if 0 <= t < len(times))
        told = bool(scenes.told[0, question.meta["object"]])
        also = tuple(event_time(times[t], told) for t in near)
    if question.kind == "point":
        side = float(scenes.size[0, question.meta["object"]])
        boxes = ((float(question.meta["x"]), float(question.meta["y"]), side, side),)
    return AskedQuestion(
        kind=question.kind,
        text=question.text,
        answer=question.answer,
        frame=question.frame,
        also=also,
        boxes=boxes,
    )


def _alert(scenes: Scenes, rng: random.Random) -> list[AskedQuestion]:
    """One thing watched for over the whole clip: in two of three clips one that comes."""
    kinds = scenes.kind[0].tolist()
    there = [m for m, kind in enumerate(kinds) if kind >= 0]
    thing = rng.choice(there) if there and rng.random() < _WATCHED_SHARE else None
    absent = rng.choice([kind for kind in range(len(KINDS)) if kind not in kinds])
    kind = absent if thing is None else kinds[thing]
    seen = (scenes.visible[0] & (scenes.kind[0] == kind)).any(1)
    return [
        AskedQuestion(
            kind=ALERT,
            text=f"Is there a {KINDS[kind]} now?",
            answer="yes" if seen[t] else "no",
            frame=t,
        )
        for t in range(scenes.num_frames)
    ]


def write_demo_clip(folder: Path, seed: int, num_frames: int = 16) -> None:
    """Writes `clip.mp4` (H.264, 2 pictures a second) and `clip.json` with four questions.

    Takes the first clip from `seed` on that shows four things, one from the start and one late.
    """
    world = WorldConfig(num_frames=num_frames, split="heldout", start_at_zero=1.0)
    last = num_frames - 1
    while True:
        frames, scenes = draw_batch(seed, 1, world, PICTURE_SIZE)
        entered = scenes.enter[0][scenes.kind[0] >= 0]
        if len(entered) == 4 and entered.min() == 0 and last / 3 <= entered.max() <= last - 3:
            break
        seed += 1
    rng = random.Random(seed)
    plan = (("where", last // 3), ("caption", last * 2 // 3), ("when", last - 1), ("count", last))
    questions = []
    for kind, t in plan:
        question = next(
            q
            for _ in range(999)
            if (q := ask(scenes, 0, kind, t, rng)) is not None and q.meta.get("first") != 0
        )
        stamp = float(scenes.times_s[0, t])
        questions.append({"ask_at_s": stamp, "text": question.text, "answer": question.answer})
    write_video(folder / "clip.mp4", frames[0].numpy(), world.fps)
    record = {"fps": world.fps, "seed": seed, "questions": questions}
    (folder / "clip.json").write_text(json.dumps(record, indent=1) + "\n")
