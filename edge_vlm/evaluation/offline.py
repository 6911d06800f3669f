"""Runs over one clip, for any model that can be asked in this process: what is shared between them
is computed once.

The first blocks of the vision transformer and the scores are the same in every run. A policy then
chooses cells, the rest of the vision side sees those only, and each question is asked after the
frames up to its own. With `FRAME` attention those of a clip are one prefix whose beginning every
question reads; with `ALL` attention, where a frame looks different once a later one is there, each
moment has a prefix of its own.

Shape letters: F frames, C cells per frame, K kept cells of a frame, G kept cells of a prefix, P its
tokens, E language width.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.runs import (
    CLIP,
    FEWER_FRAMES,
    LAST_N,
    MAX_ANSWER_TOKENS,
    MIN_CELLS,
    SCORED_POLICIES,
    THRESHOLD,
    ClipAnswers,
    Run,
)
from edge_vlm.formats.qa_set import ClipQuestions
from edge_vlm.pixels.frames import Rgb, decode_jpeg
from edge_vlm.pruning.change import LastKept
from edge_vlm.pruning.clip_budget import Variant, clip_budget, context_of, variant_of
from edge_vlm.pruning.policies import Cells, KeepPolicy, OverThreshold, Scores, make_policy
from edge_vlm.text.masks import CAUSAL
from edge_vlm.text.prompt import Ids, PromptFormat


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the language model sees of a video."""

    ids: Ids
    """Token ids i32 [P]."""
    features: npt.NDArray[np.float32]
    """f32 [G, E], added to the patch tokens in order."""
    blocks: npt.NDArray[np.int64]
    """i64 [P]: tokens of the same block see each other both ways; `CAUSAL` ones never look ahead,
    and every token sees all before it."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question after the first `end` tokens of a prefix."""

    end: int
    ids: Ids


KEPT_BYTES = 1 << 30
"""Of the decoded pictures of a clip."""
View = tuple[Prefix, Sequence[Asked]]
"""A prefix and all questions after it."""


class ClipModel(Protocol):
    """A model in this process."""

    config: ModelConfig
    prompt: PromptFormat
    max_prefix_tokens: int
    """Longest prefix that leaves room for a question and its answer."""
    max_block_tokens: int
    """Longest stretch of a prefix whose tokens see each other both ways."""

    def look(self, rgbs: Sequence[Rgb]) -> Scores:
        """Everything before the choice of cells; scores f32 [F, C]: of change
        against the frame before, and ones without a scorer."""

    def scored(self, frame: int) -> npt.NDArray[np.float32]:
        """[N, D] of a frame of the clip looked at last: what its change is scored by."""

    def features(self, cells: Sequence[Cells]) -> list[npt.NDArray[np.float32]]:
        """Of each frame of the clip looked at last: features f32 [K, E] of these cells."""

    def answer(self, views: Sequence[View], max_tokens: int = MAX_ANSWER_TOKENS) -> list[list[str]]:
        """The most likely answers to each view's questions, token by token.

        No question sees another.
        """


def can_run(config: ModelConfig, run: Run) -> bool:
    """Whether the model has what the policy looks at."""
    if run.policy == THRESHOLD:
        return config.change is not None
    return config.has_scores or run.policy not in SCORED_POLICIES


def answer_clip(
    model: ClipModel, clip: ClipQuestions, runs: Sequence[Run]
) -> Iterator[tuple[Run, ClipAnswers]]:
    """Raises FrameDecodeError, ConfigError when a clip is longer than the model can see."""
    rgbs = _Pictures(clip.jpegs)
    scores = model.look(rgbs)
    asked_ids = [model.prompt.question_ids(question.text) for question in clip.questions]
    scored = None if model.config.change is None else model.scored
    for run in runs:
        cells = choose(run, scores, rgbs, seed_of(clip), variant_of(model.config), scored)
        yield run, _answers(model, clip, run, cells, asked_ids)


def seed_of(clip: ClipQuestions) -> int:
    """Of random cells: another for each clip, the same on every path."""
    return zlib.crc32(clip.name.encode()) & 0xFFFF


def choose(
    run: Run,
    scores: Scores,
    rgbs: Sequence[Rgb],
    seed: int,
    variant: Variant,
    scored: Callable[[int], npt.NDArray[np.float32]] | None = None,
) -> list[Cells | None]:
    """The kept cells of each frame; None for a frame that is not sent at all.

    `variant`: of the clip budget. `scored`: where change against what was last kept is scored, and
    so depends on the choice, what it is scored by, by frame.
    """
    everything = np.arange(scores.shape[1], dtype=np.int32)
    if run.policy == FEWER_FRAMES:
        return [everything if run.shows_frame(i) else None for i in range(len(scores))]
    if run.policy == LAST_N:
        return [everything] * len(scores)
    if run.policy == CLIP:
        kept = clip_budget(scores, run.keep_ratio, variant=variant)  # no floor: it would cost more
        return [np.flatnonzero(row).astype(np.int32) for row in kept]
    policy: KeepPolicy
    if run.policy == THRESHOLD:
        policy = OverThreshold(run.keep_ratio, MIN_CELLS)
    else:
        policy = make_policy(run.policy, run.keep_ratio, min_cells=MIN_CELLS, seed=seed)
    chosen: list[Cells | None] = []
    last_kept = LastKept(scores.shape[1])
    for i, (row, rgb) in enumerate(zip(scores, rgbs, strict=True)):
        if scored is not None:
            row = last_kept.scores(scored(i))
        cells = policy.select(row, rgb, i == 0)
        last_kept.keep(cells)
        chosen.append(cells)
    return chosen


def clip_features(model: ClipModel, cells: Sequence[Cells]) -> list[npt.NDArray[np.float32]]:
    """Features of the cells that the clip budget chose, in the context of its variant."""
    kept = np.zeros((len(cells), model.config.vision.num_cells), np.bool_)
    for row, chosen in zip(kept, cells, strict=True):
        row[chosen] = True
    context = context_of(kept, variant=variant_of(model.config))
    features = model.features([np.flatnonzero(row).astype(np.int32) for row in context])
    return [found[mine[seen]] for found, mine, seen in zip(features, kept, context, strict=True)]


def kept_cells(run: Run, cells: Sequence[Cells | None]) -> int:
    """What the language model has to hold at the end of the clip."""
    if run.policy == LAST_N:
        cells = cells[-run.frames_kept(len(cells)) :]
    return sum(len(chosen) for chosen in cells if chosen is not None)


def _answers(
    model: ClipModel,
    clip: ClipQuestions,
    run: Run,
    cells: Sequence[Cells | None],
    asked_ids: Sequence[Ids],
) -> ClipAnswers:
    sent = [np.empty(0, np.int32) if chosen is None else chosen for chosen in cells]
    features = clip_features(model, sent) if run.policy == CLIP else model.features(sent)
    shown = [i for i, chosen in enumerate(cells) if chosen is not None]
    windows = list(_windows(clip, run, shown))
    views: list[View] = []
    for window, numbers in windows:
        prefix, ends = _prefix(model, clip, window, features, run.attention)
        _require_room(model, prefix, len(window), where=f"clip {clip.name}, run {run.name}")
        newest = [bisect_right(window, clip.questions[number].frame) - 1 for number in numbers]
        asked = [
            Asked(ends[place], asked_ids[number])
            for place, number in zip(newest, numbers, strict=True)
        ]
        views.append((prefix, asked))
    texts = [""] * len(clip.questions)
    for (_, numbers), answers in zip(windows, model.answer(views), strict=True):
        for number, text in zip(numbers, answers, strict=True):
            texts[number] = text
    num_cells = model.config.vision.num_cells
    return ClipAnswers(texts, num_cells * len(clip.jpegs), kept_cells(run, cells))


def _require_room(model: ClipModel, prefix: Prefix, num_frames: int, *, where: str) -> None:
    """Raises ConfigError naming how many frames there is room for."""
    for tokens, most in (
        (len(prefix.ids), model.max_prefix_tokens),
        (_longest_block(prefix), model.max_block_tokens),
    ):
        if tokens > most:
            raise ConfigError(
                f"{num_frames} frames are {tokens} tokens, the model has room for {most} at once",
                where=where,
                remedy=f"take about {num_frames * most // tokens} frames (--max-frames), or export "
                "the bundle with more tokens",
            )


def _longest_block(prefix: Prefix) -> int:
    """From the first to the last token of one that look at each other."""
    order = np.arange(len(prefix.blocks))
    lengths = [
        int(np.ptp(order[prefix.blocks == block])) + 1
        for block in np.unique(prefix.blocks)
        if block != CAUSAL
    ]
    return max(lengths, default=0)


class _Pictures(Sequence[Rgb]):
    """Decoded when they are looked at, and kept while that is not too much."""

    def __init__(self, jpegs: Sequence[bytes]) -> None:
        self._jpegs = jpegs
        self._kept: dict[int, Rgb] = {}
        self._room_bytes = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._jpegs)

    @overload
    def __getitem__(self, place: int) -> Rgb: ...
    @overload
    def __getitem__(self, place: slice) -> list[Rgb]: ...
    def __getitem__(self, place: int | slice) -> Rgb | list[Rgb]:
        """Raises FrameDecodeError."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if place in self._kept:
            return self._kept[place]
        rgb = decode_jpeg(self._jpegs[place])
        if rgb.nbytes <= self._room_bytes:
            self._room_bytes -= rgb.nbytes
            self._kept[place] = rgb
        return rgb


def _windows(
    clip: ClipQuestions, run: Run, shown: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Frames of a prefix, and the numbers of the questions that read it."""
    numbers = range(len(clip.questions))
    if run.attention is VisionAttention.FRAME and run.policy != LAST_N:
        if numbers:
            newest = max(question.frame for question in clip.questions)
            yield [i for i in shown if i <= newest], list(numbers)
        return
    most = run.frames_kept(len(clip.jpegs)) if run.policy == LAST_N else len(shown)
    by_window: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        seen = [i for i in shown if i <= clip.questions[number].frame]
        by_window.setdefault(tuple(seen[-most:]), []).append(number)
    for window, together in by_window.items():
        yield list(window), together


def _prefix(
    model: ClipModel,
    clip: ClipQuestions,
    window: Sequence[int],
    features: Sequence[npt.NDArray[np.float32]],
    attention: VisionAttention,
) -> tuple[Prefix, list[int]]:
    """The prefix of these frames and where each of them ends. Times count from the clip's begin."""
    prompt = model.prompt
    ids, blocks, ends = [prompt.bos_ids], [np.full(len(prompt.bos_ids), CAUSAL, np.int64)], []
    length = len(prompt.bos_ids)
    for place, i in enumerate(window):
        stamp_s = clip.times_s[i] - clip.times_s[0]
        segment = prompt.frame_ids(stamp_s, len(features[i]), first=place == 0)
        block = 0 if attention is VisionAttention.ALL else place
        ids.append(segment)
        blocks.append(np.where(prompt.vision_mask(segment), block, CAUSAL))
        length += len(segment)
        ends.append(length)
    joined = np.concatenate([features[i] for i in window])
    return Prefix(np.concatenate(ids), joined, np.concatenate(blocks)), ends
