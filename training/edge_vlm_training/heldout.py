"""Held-out clips of the rendered world as files: the benchmark set and the demo clip."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_vlm.frames import encode_jpeg
from edge_vlm.question_set import AskedQuestion, ClipQuestions
from edge_vlm_training.questions import QUESTION_KINDS, Question, ask
from edge_vlm_training.render import draw_batch
from edge_vlm_training.world import Scenes, WorldConfig

PICTURE_SIZE = 192
"""Pixels a side of what is sent: twice the model's, so that JPEG's coarse colour is harmless."""
_TRIES = 6


def heldout_clips(seed: int, per_kind: int, num_frames: int = 8) -> Iterator[ClipQuestions]:
    """Clips until every kind of question has `per_kind` questions; at most one of a kind a clip."""
    rng = random.Random(seed)
    world = WorldConfig(num_frames=num_frames, split="heldout", start_at_zero=1.0)  # as a session
    missing = dict.fromkeys(QUESTION_KINDS, per_kind)
    number = 0
    while any(missing.values()):
        frames, scenes = draw_batch(seed * 100_003 + number, 1, world, PICTURE_SIZE)
        questions = []
        for kind in (kind for kind, left in missing.items() if left):
            question = _try_to_ask(scenes, kind, rng)
            if question is not None:
                questions.append(_asked(question, scenes))
                missing[kind] -= 1
        number += 1
        if questions:
            yield ClipQuestions(
                name=f"{number:05d}",
                jpegs=[encode_jpeg(picture) for picture in frames[0].numpy()],
                times_s=scenes.times_s()[0].tolist(),
                questions=sorted(questions, key=lambda q: q.frame),
            )


def _try_to_ask(scenes: Scenes, kind: str, rng: random.Random) -> Question | None:
    for _ in range(_TRIES):
        question = ask(scenes, 0, kind, rng.randrange(scenes.num_frames), rng)
        if question is not None:
            return question
    return None


def _asked(question: Question, scenes: Scenes) -> AskedQuestion:
    box = None
    if question.kind == "point":
        side = float(scenes.size[0, question.meta["object"]])
        box = (float(question.meta["x"]), float(question.meta["y"]), side)
    return AskedQuestion(
        kind=question.kind,
        text=question.text,
        answer=question.answer,
        frame=question.frame,
        box=box,
    )


def write_demo_clip(folder: Path, seed: int, num_frames: int = 8) -> None:
    """Writes `clip.mp4` (H.264, 2 pictures a second) and `clip.json` with four questions.

    Takes the first clip from `seed` on that starts at 0 s and shows three things, one of them late.
    """
    world = WorldConfig(num_frames=num_frames, split="heldout", start_at_zero=1.0)
    while True:
        frames, scenes = draw_batch(seed, 1, world, PICTURE_SIZE)
        entered = scenes.enter[0][scenes.kind[0] >= 0]
        if len(entered) == 3 and 2 <= entered.max() <= num_frames - 3 and entered.min() == 0:
            break
        seed += 1
    rng = random.Random(seed)
    last = num_frames - 1
    plan = (("name", 2), ("where", last - 3), ("when", last - 1), ("count", last))
    questions = []
    for kind, t in plan:
        question = next(
            q
            for _ in range(999)
            if (q := ask(scenes, 0, kind, t, rng)) is not None and q.meta.get("first") != 0
        )
        stamp = float(scenes.times_s()[0, t])
        questions.append({"ask_at_s": stamp, "text": question.text, "answer": question.answer})
    _write_video(folder / "clip.mp4", frames[0].numpy(), world.fps)
    record = {"fps": world.fps, "seed": seed, "questions": questions}
    (folder / "clip.json").write_text(json.dumps(record, indent=1) + "\n")


def _write_video(path: Path, frames: npt.NDArray[np.uint8], fps: float) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
