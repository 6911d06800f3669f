"""What the model still remembers of a stream: the first frame and a window of whole frames.

Layout of the cache: `[begin, first frame] [window of frames] [dialogue]`. The first frame is the
anchor and is never evicted. The dialogue is written on a `branch`, which is cut off again when it
closes; frames are added only while none is open.

Three modes (`Attention`). In `frame` mode every frame is appended once and stays; in `exact` and
`last_n` mode the frames are only collected here and prefilled together, seeing each other both
ways, when a question is asked. That prefill stays for further questions and alerts until what they
would be shown changes.

No I/O, no clock, no threads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.text.masks import CAUSAL
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits
from edge_vlm_runtime.session.budget import MemoryPlan, shown_tokens
from edge_vlm_runtime.session.frames import Change as Change
from edge_vlm_runtime.session.frames import Evicted as Evicted
from edge_vlm_runtime.session.frames import Rebased as Rebased
from edge_vlm_runtime.session.frames import Segment as Segment
from edge_vlm_runtime.session.frames import ShownFrame as ShownFrame

if TYPE_CHECKING:
    from edge_vlm.text.prompt import PromptFormat
    from edge_vlm_runtime.inference.kv_arena import KVArena
    from edge_vlm_runtime.inference.language import LanguageModel
    from edge_vlm_runtime.inference.vision import FrameTokens
    from edge_vlm_runtime.session.stream_clock import StreamClock

HEADROOM = 0.25
"""Share of the model's positions or time range that is free again after a rebase."""
FIRST_INTERVAL_S = 0.5
"""Time stamp of the oldest frame in the window after a rebase; the anchor has 0."""
FRAMES_PER_PREFILL = 4
"""Larger batches of small appends gain nothing and grow the mask."""


@dataclass(frozen=True)
class _Remembered:
    frame: FrameTokens
    num_tokens: int


class StreamContext:
    """The memory of one stream, and the one owner of its arena."""

    def __init__(
        self,
        *,
        language: LanguageModel,
        prompt: PromptFormat,
        clock: StreamClock,
        model: ModelLimits,
        capacity: int,
        plan: MemoryPlan,
    ) -> None:
        """`capacity`: tokens of the arena."""
        self._language = language
        self._prompt = prompt
        self._clock = clock
        self._model = model
        self._arena = language.new_arena(capacity)
        self._is_lent = False
        self._plan = self._feasible(plan)
        self._remembered: list[_Remembered] = []
        self._prefilled: tuple[list[_Remembered], float] | None = None
        """What the arena holds where frames are prefilled together: which, and their time offset.
        None: nothing that a question could be asked after."""
        self._changes: list[Change] = []

    def _feasible(self, plan: MemoryPlan) -> MemoryPlan:
        return replace(plan, window_tokens=shown_tokens(plan, self._model))

    def reconfigure(self, plan: MemoryPlan) -> None:
        """Applies new settings to what is remembered.

        Raises what `LanguageModel.prefill` raises; the old settings then stay in force, with what
        was remembered if it can be shown again, with nothing if not.
        """
        self._require_not_lent()
        before, self._plan = self._plan, self._feasible(plan)
        other_mode = self._plan.attention is not before.attention
        if other_mode:
            self._clear()
        in_arena = self._in_arena and not other_mode
        self._forget(self._num_to_forget(0, self._plan.window_tokens), in_arena)
        try:
            if self._in_arena and self._remembered:
                if self._positions_run_out(0):
                    self._rebase(None, 0)
                elif other_mode:
                    self._prefill_again()
        except BaseException:
            self._plan = before
            raise

    @property
    def attention(self) -> Attention:
        return self._plan.attention

    @property
    def window_tokens(self) -> int:
        """Tokens of video that can be remembered at once."""
        return self._plan.window_tokens

    @property
    def _in_arena(self) -> bool:
        """Frames stay in the arena; else they are prefilled anew for each question."""
        return self._plan.attention is Attention.FRAME

    @property
    def time_offset_s(self) -> float:
        """The model sees stream time minus this, except for the anchor, which is always at 0."""
        return self._clock.offset_s

    @property
    def num_frames(self) -> int:
        return len(self._remembered)

    @property
    def kv_tokens(self) -> int:
        """Rows in use."""
        return self._arena.length

    @property
    def kv_capacity_tokens(self) -> int:
        return self._arena.capacity

    @property
    def next_position(self) -> int:
        return self._arena.next_position

    @property
    def num_bytes(self) -> int:
        """Memory of the arena."""
        return self._arena.num_bytes

    @property
    def video_tokens(self) -> int:
        """Tokens of the remembered frames, time stamps and markers included."""
        return sum(known.num_tokens for known in self._remembered)

    @property
    def newest(self) -> FrameTokens | None:
        return self._remembered[-1].frame if self._remembered else None

    def frame_numbers(self) -> list[int]:
        """Of the frames still remembered, oldest first; the anchor is the first of them."""
        return [known.frame.seq for known in self._remembered]

    @property
    def oldest_in_window_s(self) -> float:
        """Stream time of the oldest frame besides the anchor."""
        oldest = self._remembered[1:2] or self._remembered
        return oldest[0].frame.pts_ns * 1e-9 if oldest else 0.0

    def changes(self) -> list[Change]:
        """What was forgotten and counted anew since the last call, failed calls included."""
        changes, self._changes = self._changes, []
        return changes

    def add(self, frames: Sequence[FrameTokens]) -> None:
        """Remembers frames, oldest first, several in one prefill where there is room.

        Raises what `LanguageModel.prefill` raises; frames of a failed prefill are not remembered.
        """
        self._require_not_lent()
        rest = list(frames)
        while rest:
            if not self._remembered:
                self._clock.offset_s = rest[0].pts_ns * 1e-9
            group, segments = self._group(rest)
            if group > 1 and self._runs_out(rest[:group], segments):
                group, segments = 1, segments[:1]
            self._add_group(rest[:group], segments)
            rest = rest[group:]

    def replace(self, frames: Sequence[FrameTokens]) -> None:
        """Remembers these frames and no others, as if the stream had begun with them.

        Raises what `LanguageModel.prefill` raises; nothing is remembered then.
        """
        self._require_not_lent()
        self._clear()
        self._remembered.clear()
        try:
            self.add(frames)
        except BaseException:
            self.forget_all()
            raise

    def forget_all(self) -> None:
        """What is left of a memory that the engines failed on would answer wrongly."""
        self._clear()
        if self._remembered:
            self._changes.append(Evicted(self.num_frames, self.video_tokens))
        self._remembered.clear()

    def close(self) -> None:
        self._arena.close()

    # ---- frames that nobody has looked at yet --------------------------------------------------

    def postponed(self, *, shown: bool = True) -> list[FrameTokens]:
        """Frames that must be encoded before a branch (`shown`), or before the mode `frame`."""
        known = self._shown() if shown else self._remembered
        return [item.frame for item in known if item.frame.picture is not None]

    def encoded(self, frame: FrameTokens, encoded: FrameTokens) -> None:
        """What became of a postponed frame."""
        index = self._index_of(frame)
        self._remembered[index] = replace(self._remembered[index], frame=encoded)

    def lose(self, frame: FrameTokens) -> None:
        """Forgets a postponed frame that the engines failed on."""
        index = self._index_of(frame)
        self._changes.append(Evicted(1, self._remembered.pop(index).num_tokens))
        if index == 0 and self._remembered:  # there is a new first frame
            first = self._remembered[0].frame
            tokens = len(self._segment(first, first=True).embeds)
            self._remembered[0] = _Remembered(first, tokens)

    def _index_of(self, frame: FrameTokens) -> int:
        return next(i for i, known in enumerate(self._remembered) if known.frame is frame)

    # ---- lending the arena -------------------------------------------------------------------

    @contextmanager
    def branch(self, picture: Segment | None = None) -> Iterator[KVArena]:
        """Lends the arena, holding exactly what a question may see. What is written on it is cut
        off when the branch closes.

        A `picture` comes after the frames as one block, or, where these see each other both ways,
        in one block with them. Raises what `LanguageModel.prefill` raises.
        """
        self._require_not_lent()
        self._is_lent = True
        mark = self._arena.length if self._in_arena else 0
        try:
            if self._in_arena:
                if picture is not None:
                    self._prefill([picture])
            elif picture is not None:
                self._clear()
                self._prefill_shown(picture)
            else:
                if not self._is_prefilled():
                    self._clear()
                    self._prefill_shown(None)
                    self._prefilled = self._shown(), self.time_offset_s
                mark = self._arena.length
            yield self._arena
        finally:
            self._arena.truncate(mark)
            self._is_lent = False

    @contextmanager
    def aside(self, num_tokens: int) -> Iterator[KVArena]:
        """Lends an empty arena for `num_tokens`: another one than the stream's own, unless that
        holds nothing."""
        self._require_not_lent()
        is_free = not self._in_arena and self._prefilled is None
        arena = self._arena if is_free else self._language.new_arena(num_tokens)
        self._is_lent = True
        arena.clear()
        try:
            yield arena
        finally:
            self._is_lent = False
            arena.clear()
            if arena is not self._arena:
                arena.close()

    def picture_room(self, num_after: int) -> int:
        """Tokens of a picture that fit into a branch, with `num_after` more to come."""
        if self._in_arena:
            run, used, position = 0, self._arena.length, self._arena.next_position
        else:  # frames and picture are one block, and a block is one run
            run = used = position = self.shown_tokens
        return min(
            self._model.max_prefill_tokens - run,
            self._arena.capacity - used - num_after,
            self._model.max_positions - position - num_after,
        )

    def picture_room_aside(self, num_before: int, num_after: int) -> int:
        """Tokens of a picture that fit into an arena aside, between so many others."""
        # It is no larger than the stream's own, which has a bound in bytes.
        most = min(self._arena.capacity, self._model.max_positions)
        run = self._model.max_prefill_tokens
        return min(run, most - num_after) - num_before

    def _require_not_lent(self) -> None:
        if self._is_lent:
            raise RuntimeError("the arena is lent out, close the branch first")

    def _is_prefilled(self) -> bool:
        if self._prefilled is None:
            return False
        frames, offset_s = self._prefilled
        shown = self._shown()
        same = len(frames) == len(shown) and all(map(operator.is_, frames, shown))
        return same and offset_s == self.time_offset_s

    def _clear(self) -> None:
        self._arena.clear()
        self._prefilled = None

    def _prefill_shown(self, picture: Segment | None) -> None:
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
        """The frames that a branch shows, oldest first."""
        return [
            ShownFrame(
                known.frame.seq, self._clock.stamp_s(known.frame.pts_ns), known.frame.pts_ns * 1e-9
            )
            for known in self._shown()
        ]

    @property
    def shown_tokens(self) -> int:
        """Tokens of the frames that a branch shows."""
        return sum(known.num_tokens for known in self._shown())

    def _shown(self) -> list[_Remembered]:
        last = self._plan.attention is Attention.LAST_N
        return self._remembered[-self._plan.last_n :] if last else list(self._remembered)

    # ---- adding ------------------------------------------------------------------------------

    def _group(self, frames: list[FrameTokens]) -> tuple[int, list[Segment]]:
        """How many frames to prefill together, and their tokens."""
        anchor_tokens = self._remembered[0].num_tokens if self._remembered else 0
        room = self._plan.window_tokens - anchor_tokens
        segments: list[Segment] = []
        for index, frame in enumerate(frames[:FRAMES_PER_PREFILL]):
            segment = self._segment(frame, first=not self._remembered and index == 0)
            room -= len(segment.embeds)
            if segments and room < 0:
                break
            segments.append(segment)
        return len(segments), segments

    def _add_group(self, frames: list[FrameTokens], segments: list[Segment]) -> None:
        count = self._num_to_forget(_num_tokens(segments), self._plan.window_tokens)
        self._forget(count, in_arena=self._in_arena)
        if self._runs_out(frames, segments):
            self._rebase(frames[0], _num_tokens(segments))
            segments = [self._segment(frames[0], first=not self._remembered)]
        if self._in_arena:
            self._prefill(segments)
        else:
            self._clear()  # the frames before these are to see them
        self._remembered += [
            _Remembered(frame, len(segment.embeds))
            for frame, segment in zip(frames, segments, strict=True)
        ]

    def _segment(self, frame: FrameTokens, first: bool) -> Segment:
        ids = self._prompt.frame_ids(
            self._clock.stamp_s(frame.pts_ns), len(frame.cells), first=first
        )
        if first:
            ids = np.concatenate([self._prompt.bos_ids, ids])
        if frame.picture is not None:  # to be counted, no run of a graph would take it
            return Segment(np.empty((len(ids), 0), np.float32), self._prompt.vision_mask(ids))
        return Segment(self._language.embed(ids, frame.embeds), self._prompt.vision_mask(ids))

    def _prefill(self, segments: list[Segment]) -> None:
        blocks = [
            np.where(segment.is_vision, index, CAUSAL) for index, segment in enumerate(segments)
        ]
        embeds = np.concatenate([segment.embeds for segment in segments])
        self._language.prefill(self._arena, embeds, np.concatenate(blocks))

    def _prefill_again(self) -> None:
        """The arena anew from the frames' features; the same result as when they came. If that
        fails it is empty."""
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

    def _forget(self, count: int, in_arena: bool) -> None:
        if count == 0:
            return
        start = self._remembered[0].num_tokens
        tokens = sum(known.num_tokens for known in self._remembered[1 : 1 + count])
        if in_arena:
            self._arena.evict(start, start + tokens)
        del self._remembered[1 : 1 + count]
        self._changes.append(Evicted(count, tokens))

    # ---- positions and stamps that run out ---------------------------------------------------

    def _runs_out(self, frames: list[FrameTokens], segments: list[Segment]) -> bool:
        return self._time_runs_out(frames[-1]) or self._positions_run_out(_num_tokens(segments))

    def _time_runs_out(self, frame: FrameTokens) -> bool:
        limit = self._model.max_time_s
        return limit is not None and frame.pts_ns * 1e-9 - self.time_offset_s > limit + 0.05

    def _positions_run_out(self, num_tokens: int) -> bool:
        if not self._in_arena:
            return False  # each question starts from position 0
        wanted = self._arena.next_position + num_tokens + self._plan.reserve_tokens
        return wanted > self._model.max_positions

    def _rebase(self, frame: FrameTokens | None, num_tokens: int) -> None:
        """Counts positions, and stamps if need be, anew, with room for one more frame."""
        if frame is not None and self._time_runs_out(frame):
            self._rebase_time(frame)
        else:
            room = self._model.max_positions - self._plan.reserve_tokens
            count = self._num_to_forget(num_tokens, int(room * (1.0 - HEADROOM)))
            self._forget(count, in_arena=False)
        self._clear()
        if self._in_arena and self._remembered:
            try:
                self._prefill_again()
            except BaseException:
                self.forget_all()
                raise
        self._changes.append(Rebased(len(self._remembered), self.time_offset_s))

    def _rebase_time(self, frame: FrameTokens) -> None:
        """Forgets frames until the window spans few enough seconds, and moves it to the front."""
        assert self._model.max_time_s is not None
        span_s = self._model.max_time_s * (1.0 - HEADROOM) - FIRST_INTERVAL_S
        newest_s = frame.pts_ns * 1e-9
        window = [known.frame.pts_ns * 1e-9 for known in self._remembered[1:]]
        count = sum(1 for time_s in window if newest_s - time_s > span_s)
        oldest_s = ([*window, newest_s])[count]
        self._clock.offset_s = oldest_s - FIRST_INTERVAL_S
        self._forget(count, in_arena=False)


def _num_tokens(segments: list[Segment]) -> int:
    return sum(len(segment.embeds) for segment in segments)
