"""What the model still remembers of a stream: the first frame and a window of whole frames.

Layout of the cache: `[begin, first frame] [window of frames] | mark | [dialogue]`. The first frame
is the anchor and is never evicted. What lies behind the mark is the caller's and is truncated
before frames are added again.

Three modes (`Attention`). In `frame` mode every frame is appended once and stays; in `exact` and
`last_n` mode the frames are only collected here and prefilled together, seeing each other both
ways, when a question is asked.

No I/O, no clock, no threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_vlm.text.masks import CAUSAL
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits

if TYPE_CHECKING:
    from edge_vlm.text.prompt import PromptFormat
    from edge_vlm_runtime.inference.kv_arena import KVArena
    from edge_vlm_runtime.inference.language import LanguageModel
    from edge_vlm_runtime.inference.vision import FrameTokens

HEADROOM = 0.25
"""Share of the model's positions or time range that is free again after a rebase."""
FIRST_INTERVAL_S = 0.5
"""Time stamp of the oldest frame in the window after a rebase; the anchor has 0."""
FRAMES_PER_PREFILL = 4
"""Larger batches of small appends gain nothing and grow the mask."""


@dataclass(frozen=True)
class Evicted:
    """Frames that were forgotten to make room."""

    frames: int
    tokens: int


@dataclass(frozen=True)
class Rebased:
    """What is remembered was given fresh positions, and fresh stamps if those ran out."""

    frames: int
    time_offset_s: float


Change = Evicted | Rebased


@dataclass(frozen=True)
class _Remembered:
    frame: FrameTokens
    num_tokens: int


@dataclass(frozen=True)
class ShownFrame:
    """A frame as a question sees it."""

    sequence: int
    stamp_s: float
    """The time that is written before it."""
    capture_s: float
    """Seconds since the first frame of the stream."""


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together: those of a frame or of a picture."""

    embeds: npt.NDArray[np.float32]
    is_vision: npt.NDArray[np.bool_]


class StreamContext:
    """The memory of one stream over one arena."""

    def __init__(
        self,
        *,
        language: LanguageModel,
        prompt: PromptFormat,
        arena: KVArena,
        model: ModelLimits,
        attention: Attention,
        window_tokens: int,
        last_n: int,
        reserve_tokens: int,
    ) -> None:
        """`window_tokens`: bound of the video in the cache; `reserve_tokens`: positions that must
        stay free behind it for the dialogue."""
        self._language = language
        self._prompt = prompt
        self._arena = arena
        self._model = model
        self._remembered: list[_Remembered] = []
        self._origin_ns = 0
        self.time_offset_s = 0.0
        """The model sees capture time minus this, except for the anchor, which is always at 0."""
        self._configure(attention, window_tokens, last_n, reserve_tokens)

    def _configure(
        self, attention: Attention, window_tokens: int, last_n: int, reserve_tokens: int
    ) -> None:
        self.attention = attention
        self._last_n = last_n
        self._reserve_tokens = reserve_tokens
        self._window_tokens = window_tokens
        if attention is not Attention.FRAME:  # all of it must go through one run of the graph
            self._window_tokens = min(window_tokens, self._model.max_prefill_tokens)

    def reconfigure(
        self, *, attention: Attention, window_tokens: int, last_n: int, reserve_tokens: int
    ) -> list[Change]:
        """Applies new settings to what is remembered. Nothing may lie behind the mark."""
        other_mode = attention is not self.attention
        if other_mode:
            self._arena.clear()
        self._configure(attention, window_tokens, last_n, reserve_tokens)
        in_arena = attention is Attention.FRAME and not other_mode
        changes = self._forget(self._num_to_forget(0, self._window_tokens), in_arena)
        if attention is Attention.FRAME and self._remembered:
            if self._positions_run_out(0):
                changes += self._rebase(None, 0)
            elif other_mode:
                self._prefill_again()
        return changes

    @property
    def num_frames(self) -> int:
        return len(self._remembered)

    @property
    def video_tokens(self) -> int:
        """Tokens of the remembered frames, time stamps and markers included."""
        return sum(known.num_tokens for known in self._remembered)

    @property
    def newest(self) -> FrameTokens | None:
        return self._remembered[-1].frame if self._remembered else None

    def frame_sequences(self) -> list[int]:
        """Numbers of the frames still remembered, oldest first; the anchor is the first of them."""
        return [known.frame.seq for known in self._remembered]

    def capture_s(self, frame: FrameTokens) -> float:
        """Seconds since the first frame of the stream."""
        return (frame.pts_ns - self._origin_ns) * 1e-9

    @property
    def oldest_in_window_s(self) -> float:
        """Capture time of the oldest frame besides the anchor."""
        oldest = self._remembered[1:2] or self._remembered
        return self.capture_s(oldest[0].frame) if oldest else 0.0

    def add(self, frames: Sequence[FrameTokens]) -> list[Change]:
        """Remembers frames, oldest first, several in one prefill where there is room.

        Raises what `LanguageModel.prefill` raises; frames of a failed prefill are not remembered.
        """
        changes: list[Change] = []
        rest = list(frames)
        while rest:
            if not self._remembered:
                self._origin_ns = rest[0].pts_ns
            group, segments = self._group(rest)
            if group > 1 and self._runs_out(rest[:group], segments):
                group, segments = 1, segments[:1]
            changes += self._add_group(rest[:group], segments)
            rest = rest[group:]
        return changes

    def show(self, picture: Segment | None = None) -> None:
        """Makes the arena hold exactly what a question may see. Called before each question.

        A `picture` comes behind the frames as one block, or, where these see each other both ways,
        in one block with them. Whoever shows one truncates it away before frames are added.
        """
        if self.attention is Attention.FRAME:
            if picture is not None:
                self._prefill([picture])
            return
        self._arena.clear()
        segments = [self._segment(item.frame, first=i == 0) for i, item in enumerate(self._shown())]
        if picture is not None:
            segments.append(picture)
        is_vision = np.concatenate([segment.is_vision for segment in segments])
        self._language.prefill(
            self._arena,
            np.concatenate([segment.embeds for segment in segments]),
            np.where(is_vision, 0, CAUSAL),
        )

    def shown(self) -> list[ShownFrame]:
        """The frames that `show` shows, oldest first."""
        return [
            ShownFrame(known.frame.seq, self._stamp_s(known.frame), self.capture_s(known.frame))
            for known in self._shown()
        ]

    @property
    def shown_tokens(self) -> int:
        """Tokens of the frames that `show` shows."""
        return sum(known.num_tokens for known in self._shown())

    def _shown(self) -> list[_Remembered]:
        last = self.attention is Attention.LAST_N
        return self._remembered[-self._last_n :] if last else self._remembered

    # ---- adding ------------------------------------------------------------------------------

    def _group(self, frames: list[FrameTokens]) -> tuple[int, list[Segment]]:
        """How many frames to prefill together, and their tokens."""
        room = self._window_tokens - (self._remembered[0].num_tokens if self._remembered else 0)
        segments: list[Segment] = []
        for index, frame in enumerate(frames[:FRAMES_PER_PREFILL]):
            segment = self._segment(frame, first=not self._remembered and index == 0)
            room -= len(segment.embeds)
            if segments and room < 0:
                break
            segments.append(segment)
        return len(segments), segments

    def _add_group(self, frames: list[FrameTokens], segments: list[Segment]) -> list[Change]:
        count = self._num_to_forget(_num_tokens(segments), self._window_tokens)
        changes = self._forget(count, in_arena=self.attention is Attention.FRAME)
        if self._runs_out(frames, segments):
            changes += self._rebase(frames[0], _num_tokens(segments))
            segments = [self._segment(frames[0], first=not self._remembered)]
        if self.attention is Attention.FRAME:
            self._prefill(segments)
        self._remembered += [
            _Remembered(frame, len(segment.embeds))
            for frame, segment in zip(frames, segments, strict=True)
        ]
        return changes

    def _segment(self, frame: FrameTokens, first: bool) -> Segment:
        ids = self._prompt.frame_ids(self._stamp_s(frame), len(frame.cells), first=first)
        if first:
            ids = np.concatenate([self._prompt.bos_ids, ids])
        return Segment(self._language.embed(ids, frame.embeds), self._prompt.vision_mask(ids))

    def _stamp_s(self, frame: FrameTokens) -> float:
        is_anchor = not self._remembered or frame is self._remembered[0].frame
        return max(self.capture_s(frame) - (0.0 if is_anchor else self.time_offset_s), 0.0)

    def _prefill(self, segments: list[Segment]) -> None:
        blocks = [
            np.where(segment.is_vision, index, CAUSAL) for index, segment in enumerate(segments)
        ]
        embeds = np.concatenate([segment.embeds for segment in segments])
        self._language.prefill(self._arena, embeds, np.concatenate(blocks))

    def _prefill_again(self) -> None:
        """The arena anew from the frames' features; the same result as when they came.

        If that fails nothing is remembered any more: half a memory would answer wrongly.
        """
        segments = [
            self._segment(known.frame, first=index == 0)
            for index, known in enumerate(self._remembered)
        ]
        self._remembered = [  # fresh stamps may have other numbers of digits
            _Remembered(known.frame, len(segment.embeds))
            for known, segment in zip(self._remembered, segments, strict=True)
        ]
        try:
            for start in range(0, len(segments), FRAMES_PER_PREFILL):
                self._prefill(segments[start : start + FRAMES_PER_PREFILL])
        except BaseException:
            self._arena.clear()
            self._remembered.clear()
            raise

    # ---- forgetting --------------------------------------------------------------------------

    def _num_to_forget(self, num_tokens: int, bound: int) -> int:
        """How many of the oldest frames, the anchor aside, stand in the way of `num_tokens` more
        under `bound`."""
        excess = self.video_tokens + num_tokens - bound
        count = 0
        while excess > 0 and 1 + count < len(self._remembered):
            excess -= self._remembered[1 + count].num_tokens
            count += 1
        return count

    def _forget(self, count: int, in_arena: bool) -> list[Change]:
        if count == 0:
            return []
        start = self._remembered[0].num_tokens
        tokens = sum(known.num_tokens for known in self._remembered[1 : 1 + count])
        if in_arena:
            self._arena.evict(start, start + tokens)
        del self._remembered[1 : 1 + count]
        return [Evicted(count, tokens)]

    # ---- positions and stamps that run out ---------------------------------------------------

    def _runs_out(self, frames: list[FrameTokens], segments: list[Segment]) -> bool:
        return self._time_runs_out(frames[-1]) or self._positions_run_out(_num_tokens(segments))

    def _time_runs_out(self, frame: FrameTokens) -> bool:
        limit = self._model.max_time_s
        return limit is not None and self.capture_s(frame) - self.time_offset_s > limit + 0.05

    def _positions_run_out(self, num_tokens: int) -> bool:
        if self.attention is not Attention.FRAME:
            return False  # each question starts from position 0
        wanted = self._arena.next_position + num_tokens + self._reserve_tokens
        return wanted > self._model.max_positions

    def _rebase(self, frame: FrameTokens | None, num_tokens: int) -> list[Change]:
        """Counts positions, and stamps if need be, anew, with room for one more frame."""
        changes: list[Change] = []
        if frame is not None and self._time_runs_out(frame):
            changes += self._rebase_time(frame)
        else:
            room = self._model.max_positions - self._reserve_tokens
            count = self._num_to_forget(num_tokens, int(room * (1.0 - HEADROOM)))
            changes += self._forget(count, in_arena=False)
        self._arena.clear()
        if self.attention is Attention.FRAME and self._remembered:
            self._prefill_again()
        return [*changes, Rebased(len(self._remembered), self.time_offset_s)]

    def _rebase_time(self, frame: FrameTokens) -> list[Change]:
        """Forgets frames until the window spans few enough seconds, and moves it to the front."""
        assert self._model.max_time_s is not None
        span_s = self._model.max_time_s * (1.0 - HEADROOM) - FIRST_INTERVAL_S
        newest_s = self.capture_s(frame)
        window = [self.capture_s(known.frame) for known in self._remembered[1:]]
        count = sum(1 for time_s in window if newest_s - time_s > span_s)
        oldest_s = ([*window, newest_s])[count]
        self.time_offset_s = oldest_s - FIRST_INTERVAL_S
        return self._forget(count, in_arena=False)


def _num_tokens(segments: list[Segment]) -> int:
    return sum(len(segment.embeds) for segment in segments)
