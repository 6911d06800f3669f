"""What is measured when models answer questions, and by whom: runs and evaluators.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.formats.qa_set import ClipQuestions
from edge_vlm.pixels.sampling import FrameRule

EVALUATOR_GROUP = "edge_vlm.evaluators"
"""Entry points by path; each is an `OpenEvaluator`."""
PATHS = ("torch", "bundle", "served")

KEEP_ALL, CLIP, FEWER_FRAMES, LAST_N = "keep_all", "clip", "fewer_frames", "last_n"
THRESHOLD = "threshold"
TABLE_POLICIES = (
    *(KEEP_ALL, "stream", CLIP, "frame_topk", "random", "difference", FEWER_FRAMES, LAST_N),
)
POLICIES = (*TABLE_POLICIES, THRESHOLD)
"""Those of `edge_vlm.pruning.policies`, and three that are no choice of cells as the frames come:

- `clip`: one pool over the whole clip, later frames included, in the variant that the model was
  trained with (`edge_vlm.pruning.clip_budget`);
- `fewer_frames`: whole frames at a lower rate;
- `last_n`: every frame is looked at, the language model is shown the newest few, whole.

Of `threshold` the number is no share: cells that changed by more than it are kept, however many.
"""
SCORED_POLICIES = ("stream", CLIP, "frame_topk")
KEEP_RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
ATTENTIONS = (VisionAttention.FRAME, VisionAttention.ALL)
CHANGE = "change"
"""The scorer without weights (`edge_vlm.pruning.change`), by its name in options."""
MIN_CELLS = 2
"""Of the causal policies, as sessions have it."""
MAX_ANSWER_TOKENS = 48


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
    policies: Iterable[str] = TABLE_POLICIES,
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
                    whole = (keep == 1 and policy != THRESHOLD) or policy == KEEP_ALL
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
    attention: VisionAttention
    """What the weights were trained with."""
    has_scores: bool
    """Cells can be chosen by what a scorer says of them."""
    frames: FrameRule | None
    """Which frames of a whole clip the model was trained on; None where nothing is known."""

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
    backend: str = "ort"
    """What runs a bundle's graphs, as `serve --backend` names it."""
    scorer: str = "own"
    """`CHANGE`: what a checkpoint is measured with instead of its own, on the path `torch`."""
    reuse: float = 0.0
    """Threshold of change (0..255) of what is computed anew in front of the scorer; 0: all is."""
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
