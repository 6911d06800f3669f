"""Which questions a batch asks: more of the kinds that are still wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable

from edge_vlm_training.packing import Branch
from edge_vlm_training.questions import QUESTION_KINDS, ask_any
from edge_vlm_training.world import Scenes

_FLOOR = 0.04
_POINT_SHARE = 0.3
"""Exact coordinates stay wrong for long; at full weight they would take the batch over."""
_MAX_HISTORY = 2


class QuestionMix:
    """Running error per kind of question, and branches drawn by it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.accuracy = dict.fromkeys(QUESTION_KINDS, 0.0)

    def weights(self) -> dict[str, float]:
        weights = {kind: 1 - right + _FLOOR for kind, right in self.accuracy.items()}
        weights["point"] *= _POINT_SHARE
        return weights

    def update(self, kinds: Iterable[str], right: Iterable[bool]) -> None:
        for kind, ok in zip(kinds, right, strict=True):
            self.accuracy[kind] += 0.01 * (float(ok) - self.accuracy[kind])

    def branches(
        self, scenes: Scenes, clip: int, count: int, history_share: float
    ) -> tuple[list[Branch], list[str]]:
        """`count` questions about one clip after random frames, later ones more often."""
        branches, kinds = [], []
        weights = self.weights()
        for _ in range(count):
            frame = int(scenes.num_frames * self.rng.random() ** 0.6)
            question = ask_any(scenes, clip, self.rng, weights, frame)
            history: list[tuple[str, str]] = []
            if self.rng.random() < history_share:
                moments = sorted(
                    self.rng.randint(0, frame) for _ in range(self.rng.randint(1, _MAX_HISTORY))
                )
                for moment in moments:
                    earlier = ask_any(scenes, clip, self.rng, None, moment)
                    history.append((earlier.text, earlier.answer))
            branches.append(Branch(frame, question.text, question.answer, tuple(history)))
            kinds.append(question.kind)
        return branches, kinds
