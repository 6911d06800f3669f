"""Which questions a batch asks: more of the kinds that are still wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable

from edge_vlm_training.packing import Branch
from edge_vlm_training.questions import QUESTION_KINDS, ask_any
from edge_vlm_training.world import Scenes

_FLOOR = 0.04
_EMPHASIS = {"point": 0.15, "when": 3.0}
"""Exact coordinates stay wrong for long: at full weight they would take the batch over. The time of
an event is learned last: several digits, each of which has to be looked up by the thing's name."""
_MAX_HISTORY = 2
NOW_KINDS = ("presence", "name", "colour", "count", "where", "point")
"""Kinds whose answer lies in the newest frames: fair to ask when older ones were forgotten."""


class QuestionMix:
    """Running error per kind of question, and branches drawn by it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.accuracy = dict.fromkeys(QUESTION_KINDS, 0.0)

    def weights(self) -> dict[str, float]:
        weights = {kind: 1 - right + _FLOOR for kind, right in self.accuracy.items()}
        return {kind: weight * _EMPHASIS.get(kind, 1.0) for kind, weight in weights.items()}

    def update(self, kinds: Iterable[str], right: Iterable[bool]) -> None:
        for kind, ok in zip(kinds, right, strict=True):
            self.accuracy[kind] += 0.01 * (float(ok) - self.accuracy[kind])

    def branches(
        self, scenes: Scenes, clip: int, count: int, history_share: float, forgotten: int = 0
    ) -> tuple[list[Branch], list[str]]:
        """`count` questions about one clip after random frames, later ones more often.

        Frames 1 to `forgotten` are not shown to the language model: questions come behind them, ask
        about now only, and count frames without them.
        """
        branches, kinds = [], []
        weights = self.weights()
        if forgotten:
            weights = {kind: weights[kind] for kind in NOW_KINDS}
        shown = scenes.num_frames - forgotten
        for _ in range(count):
            frame = int(shown * self.rng.random() ** 0.6)
            if forgotten:
                frame = max(1, frame)
            question = ask_any(scenes, clip, self.rng, weights, frame + forgotten)
            history: list[tuple[str, str]] = []
            if self.rng.random() < history_share:
                moments = sorted(
                    self.rng.randint(0, frame + forgotten)
                    for _ in range(self.rng.randint(1, _MAX_HISTORY))
                )
                for moment in moments:
                    earlier = ask_any(scenes, clip, self.rng, None, moment)
                    history.append((earlier.text, earlier.answer))
            branches.append(Branch(frame, question.text, question.answer, tuple(history)))
            kinds.append(question.kind)
        return branches, kinds
