"""What is measured when models answer questions, and by whom: runs, evaluators, scores.

A *run* is one way of choosing what the language model sees: a policy, a share of cells to keep, and
which vision tokens see which. A *path* is where the answers come from: `torch` (a checkpoint),
`bundle` (an exported model, in this process) or `served` (over a websocket, as a user gets them).
Each path is an `Evaluator`, registered as an entry point; all runs of all paths answer the same
questions about the same clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.judging import Verdict
from edge_vlm.question_set import ClipQuestions
from edge_vlm.tally import Z95, wilson

EVALUATOR_GROUP = "edge_vlm.evaluators"
"""Entry points by path; each is an `OpenEvaluator`."""
PATHS = ("torch", "bundle", "served")

KEEP_ALL, CLIP, FEWER_FRAMES, LAST_N = "keep_all", "clip", "fewer_frames", "last_n"
POLICIES = (KEEP_ALL, "stream", CLIP, "frame_topk", "random", "difference", FEWER_FRAMES, LAST_N)
"""Those of `edge_vlm.pruning`, and three that are no choice of cells as the frames come:

- `clip`: the STTS paper's rule, one pool over the whole clip, later frames included;
- `fewer_frames`: whole frames at a lower rate;
- `last_n`: every frame is looked at, the language model is shown the newest few, whole.
"""
SCORED_POLICIES = ("stream", CLIP, "frame_topk")
KEEP_RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
ATTENTIONS = (VisionAttention.FRAME, VisionAttention.ALL)
MIN_CELLS = 2
"""Of the causal policies, as sessions have it."""
MAX_ANSWER_TOKENS = 48
HEADLINE = ("presence", "name", "colour", "count", "direction", "when", "where")
"""Kinds of the rendered world in the mean, where they are asked; others stand beside it."""


@dataclass(frozen=True)
class Run:
    """One way of choosing what is seen. Raises ValueError for one that makes no sense."""

    policy: str
    keep_ratio: float = 1.0
    attention: VisionAttention = VisionAttention.FRAME

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep ratio must be in (0, 1], got {self.keep_ratio}")

    @property
    def name(self) -> str:
        return f"{self.policy}:{self.keep_ratio:g}:{self.attention.value}"

    @classmethod
    def parse(cls, text: str) -> Run:
        """POLICY[:KEEP[:ATTENTION]], for example `stream:0.5:frame`. Raises ConfigError."""
        policy, *rest = text.split(":")
        try:
            if len(rest) > 2:
                raise ValueError(f"{text!r} has more than three parts")
            keep = float(rest[0]) if rest else 1.0
            attention = VisionAttention(rest[1]) if len(rest) == 2 else VisionAttention.FRAME
            return cls(policy, keep, attention)
        except ValueError as error:
            raise ConfigError(
                f"cannot read run {text!r} ({error})",
                remedy="write POLICY:KEEP[:ATTENTION], for example stream:0.5:frame",
            ) from None

    def frames_kept(self, num_frames: int) -> int:
        """Whole frames that cost as much as this share of all cells; at least one."""
        return max(1, round(self.keep_ratio * num_frames))

    def shows_frame(self, i: int) -> bool:
        """For `fewer_frames`: whether frame `i` is among those at the lower rate; the first is."""
        later, now = ((i + k) * self.keep_ratio - 1e-9 for k in (1, 0))
        return i == 0 or math.ceil(later) > math.ceil(now)


def grid(
    policies: Iterable[str] = POLICIES,
    keep_ratios: Iterable[float] = KEEP_RATIOS,
    attentions: Iterable[VisionAttention] = ATTENTIONS,
) -> list[Run]:
    """Every combination. With everything kept all policies are one: `keep_all` stands for them.

    Raises ConfigError for a policy or share that does not exist.
    """
    runs: dict[Run, None] = {}
    ratios = sorted(set(keep_ratios), reverse=True)
    try:
        for attention in dict.fromkeys(attentions):
            for policy in dict.fromkeys(policies):
                for keep in ratios:
                    whole = keep == 1 or policy == KEEP_ALL
                    run = Run(KEEP_ALL, 1.0, attention) if whole else Run(policy, keep, attention)
                    runs[run] = None
    except ValueError as error:
        raise ConfigError(str(error), where="table to make") from None
    return list(runs)


@dataclass(frozen=True)
class ClipAnswers:
    """What was said about one clip in one run."""

    texts: Sequence[str]
    """In the order of the clip's questions."""
    cells_seen: int
    cells_kept: int


class Evaluator(Protocol):
    """One path: a model that is ready to answer."""

    name: str
    """For people: the model's."""
    identity: str
    """Changes when answers may: of the weights, as far as it can be told."""

    def can(self, run: Run) -> bool:
        """Whether this path offers such a run."""

    def answers(
        self, clip: ClipQuestions, runs: Sequence[Run]
    ) -> Iterator[tuple[Run, ClipAnswers]]:
        """All runs over one clip, so that they may share what they have in common.

        Raises the typed error of whatever goes wrong.
        """


@dataclass(frozen=True, kw_only=True)
class EvaluatorOptions:
    threads: int = 2
    api_key_file: Path | None = None
    tls_ca: Path | None = None


class OpenEvaluator(Protocol):
    """The value of an entry point of `EVALUATOR_GROUP`."""

    def __call__(
        self, target: str | None, options: EvaluatorOptions
    ) -> AbstractContextManager[Evaluator]:
        """`target`: a folder or URL; None is the model that comes with the path.

        Raises the typed error of whatever is wrong with it, MissingExtraError.
        """


# ---- scores ------------------------------------------------------------------------------------


@dataclass
class KindScore:
    """One kind of question in one run: the share of right answers, or the F1 of their parts.

    Questions about the same clip are not independent. The interval is Wilson's at the *effective*
    number of questions: that of independent ones whose share would vary as much as this one does
    from clip to clip (a ratio estimator over clusters; Kish 1965, Korn & Graubard 1998). It is
    bounded by the number of clips below and of questions above.
    """

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
    def share(self) -> float:
        parts = sum(parts for _, parts in self.clips.values())
        return sum(hits for hits, _ in self.clips.values()) / parts if parts else math.nan

    @property
    def effective(self) -> float:
        """Independent questions that would tell as much."""
        p, num_clips = self.share, len(self.clips)
        if num_clips < 2 or not 0 < p < 1:
            return float(num_clips)
        parts = sum(parts for _, parts in self.clips.values())
        spread = sum((hits - p * size) ** 2 for hits, size in self.clips.values())
        variance = spread / parts**2 * num_clips / (num_clips - 1)
        if not variance:
            return float(self.asked)
        return min(max(p * (1 - p) / variance, num_clips), self.asked)

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

    def mean(self, kinds: Sequence[str] | None = None) -> float:
        """Mean share over kinds, each weighted alike."""
        shares = [self.kinds[kind].share for kind in kinds or self.headline_kinds()]
        return sum(shares) / len(shares) if shares else math.nan

    def mean_interval(self, kinds: Sequence[str] | None = None) -> tuple[float, float]:
        """95 % interval of the mean: the kinds' variances added.

        Each is taken at the middle of its Wilson interval, so that a kind without an error still
        counts as one that might have had some.
        """
        scores = [self.kinds[kind] for kind in kinds or self.headline_kinds()]
        if not scores:
            return (0.0, 1.0)
        variance = 0.0
        for score in scores:
            low, high = score.interval()
            middle = (low + high) / 2
            variance += middle * (1 - middle) / (score.effective + Z95**2)
        half = Z95 * math.sqrt(variance) / len(scores)
        mean = self.mean(kinds)
        return (max(mean - half, 0.0), min(mean + half, 1.0))


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
