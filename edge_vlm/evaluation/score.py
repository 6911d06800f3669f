"""How good the answers of a run are, and how far that may lie from the truth.

Questions about the same clip are not independent. Every interval is Wilson's at the *effective*
number of questions: that of independent ones whose share would vary as much as this one does from
clip to clip (a linearised ratio over clusters; Kish 1965, Korn & Graubard 1998), bounded by the
number of clips below and of questions above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edge_vlm.evaluation.grading import Verdict
from edge_vlm.evaluation.intervals import Z95, wilson
from edge_vlm.evaluation.runs import ATTENTIONS, PATHS, POLICIES, Run

HEADLINE = (
    "presence",
    "name",
    "colour",
    "count",
    "direction",
    "order",
    "when",
    "where",
    "caption",
    "alert",
)
"""Kinds of the rendered world in the mean, where they are asked; others stand beside it."""


@dataclass
class KindScore:
    """One kind of question in one run: the share of right answers, or the F1 of their parts."""

    right: int = 0
    asked: int = 0
    clips: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By clip: 2 found, said + true."""
    partial: bool = False
    """Answers have parts: the share is an F1 score."""

    def add(self, clip: str, verdict: Verdict) -> None:
        self.asked += 1
        self.right += verdict.right
        self.partial |= (verdict.said, verdict.true) != (1, 1)
        hits, parts = self.clips.get(clip, (0, 0))
        self.clips[clip] = (hits + 2 * verdict.found, parts + verdict.said + verdict.true)

    @property
    def parts(self) -> int:
        return sum(parts for _, parts in self.clips.values())

    @property
    def share(self) -> float:
        parts = self.parts
        return sum(hits for hits, _ in self.clips.values()) / parts if parts else math.nan

    @property
    def effective(self) -> float:
        """Independent questions that would tell as much."""
        share, parts = self.share, self.parts
        moved = {clip: (hits - share * size) / parts for clip, (hits, size) in self.clips.items()}
        return _effective(share, moved, self.asked)

    def interval(self) -> tuple[float, float]:
        return wilson(self.share, self.effective)


@dataclass
class RunScore:
    """All answers of one run on one path."""

    path: str
    run: Run
    kinds: dict[str, KindScore] = field(default_factory=dict)
    cells_seen: int = 0
    cells_kept: int = 0
    clips: int = 0

    @property
    def kept_share(self) -> float:
        return self.cells_kept / self.cells_seen if self.cells_seen else math.nan

    @property
    def asked(self) -> int:
        return sum(score.asked for score in self.kinds.values())

    def headline_kinds(self) -> list[str]:
        return [kind for kind in HEADLINE if kind in self.kinds] or sorted(self.kinds)

    @property
    def mean(self) -> float:
        """Mean share over the headline kinds, each weighted alike."""
        shares = [self.kinds[kind].share for kind in self.headline_kinds()]
        return sum(shares) / len(shares) if shares else math.nan

    def deviations(self) -> dict[str, float]:
        """By clip, how far its answers move the mean (linearised; they sum up to 0)."""
        kinds = self.headline_kinds()
        moved: dict[str, float] = {}
        for score in (self.kinds[kind] for kind in kinds):
            for clip, (hits, parts) in score.clips.items():
                move = (hits - score.share * parts) / score.parts / len(kinds)
                moved[clip] = moved.get(clip, 0.0) + move
        return moved

    def mean_interval(self) -> tuple[float, float]:
        """Wilson's at the effective number of questions, as of one kind."""
        asked = sum(self.kinds[kind].asked for kind in self.headline_kinds())
        return wilson(self.mean, _effective(self.mean, self.deviations(), asked))


def difference(score: RunScore, other: RunScore) -> tuple[float, float]:
    """Of the means of two runs over the same clips, and half its 95 % interval.

    The runs answer the same questions, so what a clip does to both cancels out. Never narrower than
    one question more or less would make it.
    """
    ours, theirs = score.deviations(), other.deviations()
    moved = {clip: ours[clip] - theirs.get(clip, 0.0) for clip in ours}
    asked = sum(score.kinds[kind].asked for kind in score.headline_kinds())
    deviation = max(math.sqrt(_variance(moved)), 1.0 / max(asked, 1))
    return score.mean - other.mean, Z95 * deviation


def _variance(moved: Mapping[str, float]) -> float:
    """Of a sum over clips drawn independently."""
    count = len(moved)
    return sum(move**2 for move in moved.values()) * count / max(count - 1, 1)


def _effective(share: float, moved: Mapping[str, float], asked: int) -> float:
    """Independent questions whose share would vary as much as this one does from clip to clip."""
    num_clips = len(moved)
    if num_clips < 2 or not 0 < share < 1:
        return float(num_clips)
    variance = _variance(moved)
    return min(max(share * (1 - share) / variance, num_clips), asked) if variance else float(asked)


def order_runs(scores: Iterable[RunScore]) -> list[RunScore]:
    """As tables show them: by path, attention, share kept and policy."""
    return sorted(
        scores,
        key=lambda score: (
            PATHS.index(score.path),
            ATTENTIONS.index(score.run.attention),
            -score.run.keep_ratio,
            POLICIES.index(score.run.policy),
        ),
    )
