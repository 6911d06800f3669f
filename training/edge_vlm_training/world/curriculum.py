"""Which questions a batch asks: more of the kinds that are still wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from edge_vlm.world.questions import ABSENT, QUESTION_KINDS, ask_any, ask_sometime
from edge_vlm.world.scenes import Scenes
from edge_vlm_training.data.sample import Branch
from edge_vlm_training.world.look_alikes import ask_look_alike

_FLOOR = 0.04
_EMPHASIS = {"point": 0.15, "caption": 0.5, "when": 1.5, "order": 2.0}
"""Exact coordinates and captions of many facts stay wrong for long: at full weight they would take
the batch over. Times of events are learned last: they have to be looked up by the things' names."""
_MAX_HISTORY = 2
NOW_KINDS = ("presence", "name", "colour", "count", "where", "point", "caption")
"""Kinds whose answer lies in the newest frames: fair to ask when older ones were forgotten."""


class QuestionMix:
    """Running error per kind of question, and branches drawn by it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.accuracy = dict.fromkeys(QUESTION_KINDS, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"random": stored_random(self.rng), "accuracy": dict(self.accuracy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_random(self.rng, state["random"])
        self.accuracy.update(state["accuracy"])

    def weights(self) -> dict[str, float]:
        weights = {kind: 1 - self.accuracy[kind] + _FLOOR for kind in QUESTION_KINDS}
        return {kind: weight * _EMPHASIS.get(kind, 1.0) for kind, weight in weights.items()}

    def update(self, kinds: Iterable[str], right: Iterable[bool]) -> None:
        for kind, ok in zip(kinds, right, strict=True):
            before = self.accuracy.get(kind, 0.0)
            self.accuracy[kind] = before + 0.01 * (float(ok) - before)

    def branches(
        self,
        scenes: Scenes,
        clip: int,
        count: int,
        history_share: float,
        forgotten: int = 0,
        at_end: bool = False,
        in_stream: bool = False,
        absent_share: float = 0.0,
        look_alike_share: float = 0.0,
    ) -> list[Branch]:
        """`count` questions about one clip after random frames, or all after the last (`at_end`).

        Frames 1 to `forgotten` are not shown to the language model: questions come after them and
        ask about now only. They count frames without these, unless the clip is one of a stream: its
        scenes know what of the past can be told, and its frames are counted as they are.
        """
        branches = []
        weights = self.weights()
        if forgotten and not in_stream:
            absent_share = 0.0  # it asks about the past, too
            weights = {kind: weights[kind] for kind in NOW_KINDS}
        last = scenes.num_frames - 1
        for _ in range(count):
            moment = last if at_end else None
            if forgotten and not at_end:
                moment = self.rng.randint(forgotten + 1, last)
            question = None
            if absent_share and self.rng.random() < absent_share:
                question = ask_sometime(scenes, clip, ABSENT, self.rng, moment)
            elif look_alike_share and self.rng.random() < look_alike_share:
                frame = self.rng.randint(0, last) if moment is None else moment
                question = ask_look_alike(scenes, clip, frame, self.rng)
            question = question or ask_any(scenes, clip, self.rng, weights, moment)
            history: list[tuple[str, str]] = []
            if self.rng.random() < history_share:
                begin = forgotten + 1 if in_stream and forgotten else 0
                earlier = sorted(
                    self.rng.randint(begin, question.frame)
                    for _ in range(self.rng.randint(1, _MAX_HISTORY))
                )
                turns = (ask_any(scenes, clip, self.rng, None, moment) for moment in earlier)
                history = [(turn.text, turn.answer) for turn in turns]
            frame = question.frame - (0 if in_stream else forgotten)
            branches.append(
                Branch(
                    kind=question.kind,
                    question=question.text,
                    answer=question.answer,
                    frame=frame,
                    history=tuple(history),
                )
            )
        return branches


def stored_random(rng: random.Random) -> list[Any]:
    """The generator's state as plain JSON types."""
    version, numbers, gauss = rng.getstate()
    return [version, list(numbers), gauss]


def restore_random(rng: random.Random, state: list[Any]) -> None:
    """Goes on from such a state."""
    version, numbers, gauss = state
    rng.setstate((version, tuple(numbers), gauss))
