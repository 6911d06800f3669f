"""Message trees: a sample as tokens, its clip once and every annotation a branch of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from edge_vlm.config import VisionAttention
from edge_vlm.errors import DataError, RecordTooLong
from edge_vlm.text.prompt import Ids, PromptFormat
from edge_vlm_training.data.sample import LAST, Pictures, Sample
from edge_vlm_training.world.vocabulary import UNKNOWN

PAPER_SCALE = 4.0
"""Of `TokenWeights`; the published code has 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """How much each token of an answer counts (arXiv 2601.10611, section 4).

    Kinds in `fixed` have that weight per token, for their answers are long; an answer of n tokens
    of any other kind has scale / sqrt(n), and with `by_branches` that over sqrt(branches of its
    clip).
    """

    fixed: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"caption": 0.1, "point": 0.2, "count_points": 0.2}
    )
    scale: float = PAPER_SCALE
    by_branches: bool = True

    def weight(self, kind: str, num_tokens: int, num_branches: int) -> float:
        if kind in self.fixed:
            return self.fixed[kind]
        return self.scale / math.sqrt(num_tokens * (num_branches if self.by_branches else 1))


@dataclasses.dataclass(frozen=True)
class BranchTokens:
    """A branch; its answer's last token, the end of the turn, is a target only."""

    kind: str
    frame: int
    """The last one that it sees."""
    text: Ids
    answer: Ids

    def __len__(self) -> int:
        """Tokens it takes in a row."""
        return len(self.text) + len(self.answer) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """A clip's prefix without its patch tokens, and branches."""

    name: str
    times_s: npt.NDArray[np.float64]
    stamps: tuple[Ids, ...]
    """Of every frame: its time and the markers; the patches come before the last of them."""
    branches: tuple[BranchTokens, ...]
    load: Callable[[int], Pictures]

    @property
    def num_frames(self) -> int:
        return len(self.stamps)

    def prefix_length(self, kept_cells: int) -> int:
        return 1 + sum(map(len, self.stamps)) + kept_cells  # 1: the begin token

    def length(self, kept_cells: int) -> int:
        """Tokens in a row if that many cells of the clip are kept."""
        return self.prefix_length(kept_cells) + sum(map(len, self.branches))


class TreeBuilder:
    """Samples to trees; remembers the ids of short texts it has met."""

    def __init__(self, prompt: PromptFormat, attention: VisionAttention) -> None:
        self.prompt, self.attention = prompt, attention
        self._unknown: int | None = None
        with contextlib.suppress(KeyError):  # byte-level vocabularies know every text
            self._unknown = prompt.tokenizer.id_of(UNKNOWN)
        remembered = functools.lru_cache(100_000)
        self._question = remembered(prompt.question_ids)
        self._answer = remembered(prompt.answer_ids)
        self._turn = remembered(prompt.turn_ids)
        self._stamp = functools.lru_cache(10_000)(
            lambda pts_s, first: prompt.frame_ids(pts_s, 0, first)
        )

    def build(self, sample: Sample) -> Tree:
        """Raises DataError for a word that the vocabulary lacks, and for a branch in mid-clip if
        vision tokens see later frames."""
        stamps = (self._stamp(round(float(t), 1), i == 0) for i, t in enumerate(sample.times_s))
        last = len(sample.times_s) - 1
        branches = []
        for branch in sample.branches:
            frame = last if branch.frame == LAST else branch.frame
            if frame != last and self.attention is VisionAttention.ALL:
                raise DataError(
                    f"a question after frame {frame} of {last + 1} would see later frames: vision "
                    "tokens of this model see each other both ways",
                    where=sample.name,
                    remedy="ask at the clip's end, or train a model with attention 'frame'",
                )
            turns = [self._turn(*turn) for turn in branch.history]
            text = np.concatenate([*turns, self._question(branch.question)])
            answer = self._answer(branch.answer)
            if self._unknown in text or self._unknown in answer:
                raise DataError(
                    f"a word that the vocabulary lacks in {branch.question!r} or {branch.answer!r}",
                    where=sample.name,
                    remedy="train with a tokenizer made for these texts, or a published one",
                )
            branches.append(BranchTokens(branch.kind, frame, text, answer))
        return Tree(
            name=sample.name,
            times_s=sample.times_s,
            stamps=tuple(stamps),
            branches=tuple(branches),
            load=sample.load,
        )


def split_tree(
    tree: Tree, *, kept_cells: int, max_tokens: int, max_branches: int
) -> Iterator[Tree]:
    """The tree, or if it is too long or wide several of the same clip: no branch is lost.

    Raises RecordTooLong if a branch does not fit after the clip even alone.
    """
    room = max_tokens - tree.prefix_length(kept_cells)
    part: list[BranchTokens] = []
    for branch in tree.branches:
        if len(branch) > room:
            raise RecordTooLong(
                f"{tree.prefix_length(kept_cells) + len(branch)} tokens of video and annotation, a "
                f"row has {max_tokens}",
                where=tree.name,
                remedy="sample fewer frames, remove more cells, or pack longer rows",
            )
        if part and (sum(map(len, part)) + len(branch) > room or len(part) == max_branches):
            yield dataclasses.replace(tree, branches=tuple(part))
            part = []
        part.append(branch)
    yield dataclasses.replace(tree, branches=tuple(part))
